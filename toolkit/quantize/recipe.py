"""What was asked for, as it stands in qvl.json: equal recipes on equal sources give equal files."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import FormatError, ManifestError

__all__ = ["Recipe"]

_CHOICES = {
    "search": ("moments", "autoawq"),
    "scaling": ("plain", "duo"),
    "rounding": ("nearest", "compensated"),
    "balance": ("none", "modality"),
}


@dataclass(frozen=True)
class Recipe:
    """The settings of a quantization; see :func:`toolkit.quantize.quantize`."""

    format: str = "gemm"
    bits: int = 4
    group_size: int = 128
    search: str = "moments"
    scaling: str = "plain"
    clip: bool = True
    rounding: str = "compensated"
    balance: str = "none"
    skip: str | None = None
    samples: int = 128
    max_tokens: int = 4096
    max_pixels: int | None = 1280 * 28 * 28
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise QvlError for a setting that is none; :func:`toolkit.quantize.plan.check_settings` looks at shapes."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise FormatError(f"unknown {name} {value!r}: choose {' or '.join(choices)}")
        if self.samples < 1:
            raise ManifestError(f"{self.samples} calibration samples: at least 1 is needed, 128 is usual")
        if self.search == "autoawq" and (self.rounding != "nearest" or self.balance != "none"):
            raise FormatError(
                "AutoAWQ's search rounds to nearest and weighs all tokens alike: "
                "leave --rounding and --balance out, or use --search moments"
            )
