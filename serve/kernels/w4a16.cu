// out[m, n] = sum over k of x[m, k] * (q[k, n] - z[k / group, n]) * s[k / group, n], + bias[n]: 4-bit weights, few rows.
//
// How it differs from Marlin. Marlin is a matrix product that also takes few rows: 16 rows are its unit, weights go
// through shared memory, a global lock orders the CTAs that share a column. With 1 to 16 rows the product is a race of
// bytes: everything here serves to keep loads of weights in flight, from before the kernel may begin to its last unit.
//
// - Weights are the M side of the tensor core's product (16 n x 16 k), rows of x the N side (8). So one row wastes 7/8
//   of an instruction that is not what runs out, where Marlin's 16 rows waste 15/16, and 64 columns need 4 products.
// - Weights go from memory straight to the registers that the product wants, 16 bytes a lane, RD such loads ahead. That
//   is what the tiles are made for (serve/kernels/tiles.py): they are those that Humming keeps for more rows, which
//   read the same copy.
// - A nibble pair becomes two 16-bit floats by one lop3 (128 + q in bfloat16, 1024 + q in float16, both exact). Nothing
//   is subtracted from a weight: a fifth product, with ones for weights, sums the inputs, and a group's end takes
//   (128 + z) times that sum away, in float32, as it brings in the scale.
// - The weights of the first unit are asked for before `griddepcontrol.wait`: they depend on no other kernel. That takes
//   most of a launch's cost away inside a CUDA graph, where the kernel before has let this one start.
// - K is split over the warps of a CTA and the SPLIT CTAs of a cluster. Sums go from CTA to CTA through shared memory,
//   an equal part to each owner, behind the next tile's products: no lock, no atomic, nothing to reset.
//
// Units: a tile is 64 n x 16 k, 512 bytes. A unit of work is UT tiles along k. A warp takes every WARPS-th unit of its
// CTA's share of K, for every column tile that its cluster owns; the next unit's loads run beside this one's products,
// over the borders of tiles too.
//
// Compiled by NVRTC (serve/kernels/nvrtc.py), a kernel for each plan (serve/kernels/plans.py). Hopper (sm_90).

typedef unsigned int u32;
typedef unsigned short u16;

// What a plan says; these are only to read by.
#ifndef WARPS
#define WARPS 4        // of a CTA
#define SPLIT 2        // CTAs of a cluster, which share K
#define BLOCKS 3       // CTAs that an SM should hold
#define RD 8           // tiles that a warp loads ahead; at most UT
#define UT 8           // tiles of a unit
#define MT 1           // blocks of 8 rows
#define GROUP_TILES 8  // tiles that share a scale: group size / 16
#define ALIAS 0        // 1: there is one round, sums may lie where the inputs lay
#define HALF 0         // activations and scales: 0 bfloat16, 1 float16
#endif

#if HALF
#define MAGIC 0x64006400u
#define BASE 1024.0f
#define ONES 0x3c003c00u
#define TYPES "f32.f16.f16.f32"
#else
#define MAGIC 0x43004300u
#define BASE 128.0f
#define ONES 0x3f803f80u
#define TYPES "f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The lowest nibble of both halves of a word, as BASE + q.
__device__ __forceinline__ u32 nibbles(u32 word) {
  u32 found;
  asm("lop3.b32 %0, %1, 0x000f000f, %2, 0xEA;" : "=r"(found) : "r"(word), "r"(MAGIC));
  return found;
}

// Read once, so kept out of L1.
__device__ __forceinline__ uint4 stream(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

__device__ __forceinline__ float wide(u16 v) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((u32)v << 16);
#endif
}

__device__ __forceinline__ u16 narrow(float f) {
  u16 v;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// x [M, K], w tiles [K / 16][stride / 64][32][4] words, scales [K / group][stride] and zeros [K / group][stride / 8] in
// the tiles' order of columns, bias [N] or null, out [M, N]. stride: N with its padding, a multiple of 64 as N is.
// K: a multiple of 16 UT. M: at most 8 MT.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
w4a16(const u16* __restrict__ x, const uint4* __restrict__ w, const uint4* __restrict__ scales,
      const u32* __restrict__ zeros, const u16* __restrict__ bias, u16* __restrict__ out, int M, int N, int K,
      int stride) {
  extern __shared__ char shared[];
  constexpr int CELLS = 64 * 8 * MT;                        // sums of a column tile
  constexpr int GT = GROUP_TILES < UT ? GROUP_TILES : UT;   // tiles between two changes of scale
  constexpr int SETS = UT / GT;                             // scales of a unit
  constexpr int PER = GROUP_TILES / GT;                     // units that share a scale, where a unit is less than a group
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int ntiles = N / 64, units = K / (16 * UT);
  const int part = blockIdx.x % SPLIT, clusters = gridDim.x / SPLIT;
  const int begin = units * part / SPLIT, end = units * (part + 1) / SPLIT;  // this CTA's share of K
  const int first = begin + warp;
  const int trow = stride / 2, srow = stride / 8;           // from a k tile to the next, from a group to the next
  int tile = blockIdx.x / SPLIT;

  // The first unit's weights, scales and zeros: before anything that another kernel makes is looked at.
  uint4 ring[RD], s4[SETS];
  u32 z4[SETS];
  const uint4 *here, *next = w + (u32)(first * UT * trow + tile * 32 + lane);
  if (first < end) {
#pragma unroll
    for (int d = 0; d < RD; d++) ring[d] = stream(next + d * trow);
#pragma unroll
    for (int e = 0; e < SETS; e++) {
      const int at = (first * SETS + e) / PER * srow + tile * 8 + lane / 4;
      s4[e] = scales[at];
      z4[e] = zeros[at];
    }
  }
#if SPLIT > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // all run before one writes into another
#endif
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");

  // Shared memory: inbox [1 or 2 rounds][SPLIT][cells / SPLIT], sums [WARPS][8 MT m][64 n], inputs [8 MT][width + 8].
  float* inbox = (float*)shared;
  float* sums = inbox + (SPLIT > 1 ? (ALIAS ? 1 : 2) * (CELLS + SPLIT * 4) : 0);
  u16* inputs = (u16*)(sums + (ALIAS ? 0 : WARPS * CELLS));
  const int width = (end - begin) * 16 * UT, pitch = width + 8;  // 16 bytes more a row: ldmatrix meets no conflict
  for (int i = threadIdx.x; i < 8 * MT * (width / 8); i += WARPS * 32) {
    const int m = i / (width / 8), c = i % (width / 8);
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m < M) v = *(const uint4*)(x + (long long)m * K + begin * 16 * UT + c * 8);
    *(uint4*)(inputs + m * pitch + c * 8) = v;
  }
#if SPLIT > 1
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
  __syncthreads();

  const u32 rows = (u32)__cvta_generic_to_shared(inputs) + ((lane % 8) * pitch + (lane / 8) * 8) * 2;
  const int cells = 64 * (M < 8 * MT ? M : 8 * MT);
  const int per = (cells + SPLIT - 1) / SPLIT;              // cells that a CTA of the cluster owns
  float total[MT][4][4], acc[MT][4][4], ones[MT][4];
#pragma unroll
  for (int t = 0; t < MT; t++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      ones[t][i] = 0.f;
#pragma unroll
      for (int b = 0; b < 4; b++) total[t][b][i] = acc[t][b][i] = 0.f;
    }

  auto put = [&](int cell, int of, float value) {           // a finished sum, cell = m * 64 + n, of a column tile
    const int m = cell / 64, n = of * 64 + cell % 64;
    if (bias) value += wide(bias[n]);
    out[(long long)m * N + n] = narrow(value);
  };
#if SPLIT > 1
  auto collect = [&](int round, int of) {                   // what the cluster sent for the cells that are ours
    const float* box = inbox + (round & 1) * SPLIT * per;
    for (int i = threadIdx.x; i < per && part * per + i < cells; i += WARPS * 32) {
      float a = 0.f;
#pragma unroll
      for (int r = 0; r < SPLIT; r++) a += box[r * per + i];
      put(part * per + i, of, a);
    }
  };
#endif

  int round = 0;
  for (; tile < ntiles; tile += clusters, round++) {
    for (int unit = first; unit < end; unit += WARPS) {
      // Where the warp goes from here: its next unit, or its first one of the next column tile.
      const bool wraps = unit + WARPS >= end, more = !wraps || tile + clusters < ntiles;
      const int unit_next = wraps ? first : unit + WARPS, tile_next = wraps ? tile + clusters : tile;
      here = next;
      next = w + (u32)(unit_next * UT * trow + tile_next * 32 + lane);
      const u32 at_x = rows + (unit - begin) * UT * 32;
#pragma unroll
      for (int d = 0; d < UT; d += 2) {
        u32 b[MT][4];
#pragma unroll
        for (int t = 0; t < MT; t++)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b[t][0]), "=r"(b[t][1]), "=r"(b[t][2]), "=r"(b[t][3])
                       : "r"(at_x + t * 16 * pitch + d * 32));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 v = ring[(d + h) % RD];
          if (d + h + RD < UT) ring[(d + h) % RD] = stream(here + (d + h + RD) * trow);
          else if (more) ring[(d + h) % RD] = stream(next + (d + h + RD - UT) * trow);
          const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            // pairs in a word: (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8)
            const u32 p0 = nibbles(words[j]), p1 = nibbles(words[j] >> 4);
            const u32 p2 = nibbles(words[j] >> 8), p3 = nibbles(words[j] >> 12);
#pragma unroll
            for (int t = 0; t < MT; t++) product(acc[t][j], p0, p2, p1, p3, b[t][2 * h], b[t][2 * h + 1]);
          }
#pragma unroll
          for (int t = 0; t < MT; t++) product(ones[t], ONES, ONES, ONES, ONES, b[t][2 * h], b[t][2 * h + 1]);
        }
        if ((d + 2) % GT == 0) {  // a group ends: its scale and its zero point
          const int e = (d + 2) / GT - 1;
          const u32 s[4] = {s4[e].x, s4[e].y, s4[e].z, s4[e].w}, z = z4[e];
          if (more) {
            const int at = (unit_next * SETS + e) / PER * srow + tile_next * 8 + lane / 4;
            s4[e] = scales[at];
            z4[e] = zeros[at];
          }
#pragma unroll
          for (int b = 0; b < 4; b++) {
            const float s0 = wide((u16)s[b]), s1 = wide((u16)(s[b] >> 16));
            const float z0 = BASE + (float)(z >> (8 * b) & 15), z1 = BASE + (float)(z >> (8 * b + 4) & 15);
#pragma unroll
            for (int t = 0; t < MT; t++) {
              total[t][b][0] += s0 * (acc[t][b][0] - z0 * ones[t][0]);
              total[t][b][1] += s0 * (acc[t][b][1] - z0 * ones[t][1]);
              total[t][b][2] += s1 * (acc[t][b][2] - z1 * ones[t][0]);
              total[t][b][3] += s1 * (acc[t][b][3] - z1 * ones[t][1]);
#pragma unroll
              for (int i = 0; i < 4; i++) acc[t][b][i] = 0.f;
            }
          }
#pragma unroll
          for (int t = 0; t < MT; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) ones[t][i] = 0.f;
        }
      }
    }

    // The column tile is summed up: over the warps in shared memory, then over the cluster, to each cell's owner.
    if (ALIAS || round) __syncthreads();
#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
      for (int b = 0; b < 4; b++) {
        const int n = 16 * b + lane / 4, m = t * 8 + lane % 4 * 2;
        float* p = sums + warp * CELLS + n;
        if (m < M) p[m * 64] = total[t][b][0], p[m * 64 + 8] = total[t][b][2];
        if (m + 1 < M) p[m * 64 + 64] = total[t][b][1], p[m * 64 + 72] = total[t][b][3];
#pragma unroll
        for (int i = 0; i < 4; i++) total[t][b][i] = 0.f;
      }
    __syncthreads();
#if SPLIT > 1
    if (round) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      collect(round - 1, tile - clusters);
    }
#endif
    for (int cell = threadIdx.x; cell < cells; cell += WARPS * 32) {
      float a = 0.f;
#pragma unroll
      for (int q = 0; q < WARPS; q++) a += sums[q * CELLS + cell];
#if SPLIT > 1
      const u32 mine = (u32)__cvta_generic_to_shared(inbox + (round & 1) * SPLIT * per + part * per + cell % per);
      u32 there;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(mine), "r"(cell / per));
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(a) : "memory");
#else
      put(cell, tile, a);
#endif
    }
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  }
#if SPLIT > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  collect(round - 1, tile - clusters);
#endif
}
