"""What is asked of a quantization: the command line, a resumed run's identity and qvl.json are all made from this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from toolkit.errors import FormatError, ManifestError, QvlError
from toolkit.options import Option, Settings

__all__ = ["Recipe", "RunOptions"]

_SEARCH, _MIXED = "Search", "Layers in 16 bits"
#: Calibration samples by effort: inputs behind quantized layers tell more of them.
_SAMPLES = {"fast": 128, "best": 512}
#: What qvl.json calls the recipe, in the order in which it stands there. The other settings name files, whose content
#: is recorded instead: the samples' hash, the source's, the linears left in 16 bits.
_RECORDED = (
    "format",
    "bits",
    "group_size",
    "search",
    "effort",
    "distill",
    "scaling",
    "clip",
    "rounding",
    "balance",
    "vision",
    "lm_head",
    "skip",
    "samples",
    "max_tokens",
    "max_pixels",
    "seed",
)


class Recipe(Settings):
    """What decides a quantization's result: equal recipes on equal sources give equal files.

    Raises:
        FormatError: a setting is unknown, or does not go with another.
        ManifestError: no calibration sample is asked for.
    """

    error: ClassVar[type[QvlError]] = FormatError

    format: Annotated[str, Option("gemm or compressed-tensors (vLLM runs both), or gemv.")] = "gemm"
    group_size: Annotated[int, Option("Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 128
    bits: Annotated[int, Option("Bits of a weight: 4, all that the formats hold.")] = 4
    calib: Annotated[str, Option("JSONL manifest of chats with images, or 'demo'.")] = "demo"
    #: 512 with the best effort, where no other number is given.
    samples: Annotated[
        int,
        Option(
            "Calibration samples to use.", show_default=f"{_SAMPLES['fast']}; {_SAMPLES['best']} with the best effort"
        ),
    ] = _SAMPLES["fast"]
    adapter: Annotated[Path | None, Option("LoRA adapter directory, merged first (peft).")] = None
    revision: Annotated[str | None, Option("Branch, tag or commit of a hub id.")] = None
    search: Annotated[
        Literal["moments", "autoawq"],
        Option("moments (second moments, fast) or autoawq (its own loop).", panel=_SEARCH),
    ] = "moments"
    effort: Annotated[
        Literal["fast", "best"],
        Option("fast, or best: layers behind quantized ones, values gone over again; slower.", panel=_SEARCH),
    ] = "fast"
    #: True with the best effort, where nothing else is given.
    distill: Annotated[
        bool,
        Option(
            "At the end, train scales, norms and biases on the source's own answers.",
            name="--distill/--no-distill",
            panel=_SEARCH,
            show_default="with the best effort",
        ),
    ] = False
    scaling: Annotated[
        Literal["plain", "duo", "none"],
        Option(
            "AutoAWQ's grid: plain (activations) or duo (activations over weights). With moments: none.", panel=_SEARCH
        ),
    ] = "plain"
    clip: Annotated[bool, Option("Search for clipped ranges too.", panel=_SEARCH)] = True
    #: Never None in a recipe that is made: what goes with the search stands in for it.
    rounding: Annotated[
        Literal["nearest", "compensated"] | None,
        Option(
            "compensated (later columns make up for earlier ones; with moments, the default) or nearest.",
            panel=_SEARCH,
        ),
        Field(validate_default=True),
    ] = None
    balance: Annotated[
        Literal["none", "modality"],
        Option("none, or modality: weigh vision and text tokens by sensitivity.", panel=_SEARCH),
    ] = "none"
    vision: Annotated[
        Literal["16bit", "awq"],
        Option("The vision tower: 16bit as in the source, or awq in 4 bits.", panel=_MIXED),
    ] = "16bit"
    lm_head: Annotated[bool, Option("Quantize the output head too; a tied one is untied.", panel=_MIXED)] = False
    skip: Annotated[str | None, Option("Regular expression of linears to leave in 16 bits.", panel=_MIXED)] = None
    from_report: Annotated[Path | None, Option("A layers' report: leave in 16 bits what hurts most.", panel=_MIXED)] = (
        None
    )
    budget: Annotated[float, Option("How much larger that may make it: 0.1 is 10%.", panel=_MIXED)] = 0.1
    max_tokens: Annotated[int, Option("Leave out calibration samples with more tokens.")] = 4096
    #: None, for which 0 may be given: the processor's own.
    max_pixels: Annotated[
        int | None, Option("Scale calibration images down to so many pixels; 0: as the processor does.")
    ] = 1280 * 28 * 28
    seed: Annotated[int, Option("Seed of the draw of samples.")] = 0

    @model_validator(mode="before")
    @classmethod
    def _of_the_effort(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("effort") == "best":
            return {"samples": _SAMPLES["best"], "scaling": "none", "distill": True, **given}
        return given

    @field_validator("search", "effort", "scaling", "rounding", "balance", "vision", mode="before")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        choices = [choice for part in get_args(kind) for choice in get_args(part) or (part,)]
        if value not in choices and not (value is None and type(None) in choices):
            raise FormatError(
                f"unknown {info.field_name} {value!r}: choose {' or '.join(c for c in choices if isinstance(c, str))}"
            )
        return value

    @field_validator("rounding")
    @classmethod
    def _rounding_of_the_search(cls, value: str | None, info: ValidationInfo) -> str:
        return value or ("compensated" if info.data["search"] == "moments" else "nearest")

    @field_validator("max_pixels")
    @classmethod
    def _bound(cls, value: int | None) -> int | None:
        return value or None

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what is none; :func:`toolkit.quantize.plan.check_settings` looks at shapes."""
        if self.samples < 1:
            raise ManifestError(f"{self.samples} calibration samples: at least 1 is needed, 128 is usual")
        if self.search == "autoawq" and (self.rounding != "nearest" or self.balance != "none"):
            raise FormatError(
                "AutoAWQ's search rounds to nearest and weighs all tokens alike: "
                "leave --rounding and --balance out, or use --search moments"
            )
        if self.effort == "best" and (self.search != "moments" or self.rounding != "compensated"):
            raise FormatError(
                "--effort best goes on from compensated rounding by second moments: "
                "leave --search and --rounding out, or use --effort fast"
            )
        # What was given and would be ignored is refused: qvl.json would record it. Defaults are nobody's wish.
        self._check_scaling()
        if "budget" in self.model_fields_set and self.from_report is None:
            raise FormatError(
                f"--budget {self.budget:g} is for the layers that a report says to leave in 16 bits: "
                "add --from-report, or leave --budget out"
            )
        return self

    def _check_scaling(self) -> None:
        if self.search == "autoawq" and self.scaling == "none":
            raise FormatError("--scaling none is of --search moments: AutoAWQ's search is one for scales")
        if "scaling" not in self.model_fields_set or self.search == "autoawq" or self.scaling == "none":
            return
        does = "searches for no scales" if self.effort == "best" else "tries both scalings"
        raise FormatError(
            f"--scaling {self.scaling} is of AutoAWQ's search, and --search {self.search} {does}: "
            "leave --scaling out, or add --search autoawq"
        )

    def recorded(self) -> dict[str, Any]:
        """Return the recipe as it stands in qvl.json and in a resumed run's identity."""
        return {name: getattr(self, name) for name in _RECORDED}


class RunOptions(Settings):
    """What is about one run and not about its result."""

    layers_report: Annotated[
        Path | None,
        Option(
            "Write what each unit costs in KL, and each layer's error by three searches, to this JSON file.",
            panel=_MIXED,
            before="from_report",
        ),
    ] = None
    devices: Annotated[str, Option("auto, cpu, cuda, or several GPUs: 0,1.")] = "auto"
    force: Annotated[bool, Option("Replace an existing OUT.")] = False
    restart: Annotated[bool, Option("Begin anew: discard the layers that a stopped run finished.")] = False
    dry_run: Annotated[bool, Option("Say what memory, disk and time it takes, and stop.")] = False
    verdict: Annotated[
        bool, Option("Measure at the end how far answers that were held out drift from the source's.")
    ] = True
