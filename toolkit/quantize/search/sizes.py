"""Numbers that planning a run and doing it share: rows that screening looks at, bytes of a packed linear."""

__all__ = ["HEAD_ROWS", "REFIT_NUMBERS", "REFIT_WEIGHTS", "packed_bytes", "screen_rows"]

#: Rows of a weight that screening looks at, at most, and numbers in them; all of them where there are fewer.
_SCREEN_ROWS, _SCREEN_WEIGHTS = 1024, 2**23
#: Weights whose scales are refitted at a time, of which some three copies are held, and numbers in their equations.
REFIT_WEIGHTS, REFIT_NUMBERS = 2**26, 2**28
#: Rows of the output head that are rounded at a time.
HEAD_ROWS = 8192


def screen_rows(columns: int) -> int:
    """Return how many rows of so many columns screening looks at: fewer of wide ones, a row costs their square."""
    return min(_SCREEN_ROWS, _SCREEN_WEIGHTS // columns)


def packed_bytes(inputs: int, outputs: int, group_size: int) -> int:
    """Return the bytes of a linear's qweight, qzeros and fp16 scales in the GEMM layout (GEMV pads a little more)."""
    groups = 1 if group_size == -1 else inputs // group_size
    return inputs * outputs // 2 + groups * outputs // 2 + 2 * groups * outputs
