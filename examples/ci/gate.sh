#!/usr/bin/env bash
# Quantize, measure against the 16-bit model, hold the report against the one of the main branch.
#
#   examples/ci/gate.sh REFERENCE OUT     REFERENCE: directory of the report to compare with; made if it is not there
#
# MODEL        the 16-bit model: directory, hub id or demo                  (demo)
# CANDIDATE    a checkpoint or URL to measure; without it MODEL is quantized to OUT/awq
# CALIB, TASKS calibration chats; questions of the benchmark                 (demo)
# BENCH        further options of qvl bench                                   (--quick --concurrency none)
# FAIL_IF      conditions, one a line
#
# Exit code: 0 no worse, or a reference was made; 1 worse beyond chance; 2 a mistake; 3 could not be measured.
set -euo pipefail
reference=${1:?usage: gate.sh REFERENCE OUT} out=${2:?usage: gate.sh REFERENCE OUT}
model=${MODEL:-demo}
mkdir -p "$out"
if [ -z "${CANDIDATE:-}" ]; then
    qvl quantize --model "$model" --out "$out/awq" --calib "${CALIB:-demo}" --samples "${SAMPLES:-48}" --force
fi
read -ra bench <<<"${BENCH:---quick --concurrency none}"
qvl bench --baseline "$model" --candidate "${CANDIDATE:-$out/awq}" --tasks "${TASKS:-demo}" --out "$out/report" --force "${bench[@]}"
if [ ! -f "$reference/report.json" ]; then
    mkdir -p "$reference"
    cp "$out/report/report.json" "$reference/"
    echo "no report to compare with: this one is it from now on ($reference)"
    exit 0
fi
conditions=()
while IFS= read -r condition; do
    [ -z "$condition" ] || conditions+=(--fail-if "$condition")
done <<<"${FAIL_IF:-accuracy<-1pt}"
qvl compare "$reference" "$out/report" "${conditions[@]}" --markdown "$out/comment.md" --html "$out/compare.html"
