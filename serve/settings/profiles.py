"""Profiles: settings of vLLM that were measured to be fast, for a card, a model's shape, a format and a vLLM version.

A profile file holds what `qvl tune` measured: candidates, each a set of `EngineSettings`, and their figures at each
load. Some ship with the project (`serve/settings/profiles/`), a user's own lie in the cache and come first. One for
another card or another vLLM is not used: kernels and their ranking change with both.

The kernels that vLLM 0.32 has for 4-bit weights with zero points on CUDA, in the order in which it takes the first
that can (``_POSSIBLE_KERNELS``, ``prioritize_humming``): on Hopper Machete, Humming, Marlin, Conch (its package
installed), Triton; on other cards Marlin (from Turing on), Conch, Triton, Humming. CUTLASS W4A8 and Exllama are in that
list and take no zero points. ``--linear-backend`` names one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from serve.settings.backend import Backend, find_gpus, installed_vllm
from serve.settings.engine import EngineSettings
from toolkit.errors import ServerError
from toolkit.files import write_whole
from toolkit.paths import cache_dir

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["HOPPER", "MODES", "Choice", "Key", "Measured", "Mode", "Profile", "as_mode", "choose", "key_for", "save"]

Mode = Literal["auto", "latency", "throughput", "off"]
MODES: tuple[Mode, ...] = get_args(Mode)


def as_mode(text: str) -> Mode:
    """Return what ``--profile`` was given as. Raises ServerError for no mode."""
    if text not in MODES:
        raise ServerError(f"--profile {text}: one of {', '.join(MODES)}.")
    return text


_SCHEMA = 1
#: Candidates that are apart by less, as a share, are as good as each other: rounds differ by more.
_AS_GOOD = 0.02
#: What is compared, and whether more of it is better.
_METRICS = {"output_tokens_per_s": True, "tpot_ms": False}
_SHIPPED = Path(__file__).with_name("profiles")
#: Names of cards with compute capability 9.0.
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


@dataclass(frozen=True)
class Key:
    """What a profile is for."""

    #: The GPU's name as nvidia-smi gives it; for a CPU its model and the cores that may be used.
    card: str
    #: Layers x hidden size x intermediate size.
    model: str
    #: "fp16", or "awq-g128" with the group size, "+16" where some layers are in 16 bits.
    format: str
    #: Version of vLLM.
    vllm: str
    #: GPUs that split the weights.
    tp: int = 1


def model_key(text_config: Mapping[str, Any]) -> str:
    """Return what a `Key` calls a model: the sizes that its speed depends on."""
    return "x".join(str(text_config[name]) for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))


def format_key(group_size: int, mixed: bool = False) -> str:
    """Return what a `Key` calls an AWQ checkpoint's format; ``mixed``: some layers are in 16 bits."""
    return f"awq-g{group_size}" + ("+16" if mixed else "")


def key_for(checkpoint: Checkpoint, backend: Backend, tp: int = 1) -> Key:
    """Return what a profile for this checkpoint on this machine must be for."""
    info = checkpoint.quantization
    form = "fp16" if info is None else format_key(info.group_size, bool(checkpoint.left_linears()))
    gpus = find_gpus() if backend == "gpu" else []
    card = gpus[0].name if gpus else _cpu_name()
    build = installed_vllm()
    return Key(card, model_key(checkpoint.text_config), form, build[1] if build else "none", tp)


def _cpu_name() -> str:
    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


@dataclass(frozen=True)
class Measured:
    """The figures at one load: of each candidate, and of the 16-bit model; None: not measured."""

    concurrency: int
    figures: dict[str, float]
    fp16: float | None = None


@dataclass(frozen=True)
class Profile:
    """What was measured for a `Key`."""

    key: Key
    candidates: dict[str, EngineSettings]
    loads: tuple[Measured, ...]
    #: What the figures are: one of `_METRICS`.
    metric: str = "output_tokens_per_s"
    #: Where the figures come from: when, with what, on what inputs.
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metric not in _METRICS:
            raise ServerError(f"unknown metric {self.metric!r} in a profile: one of {', '.join(_METRICS)}.")
        for load in self.loads:
            if not load.figures or set(load.figures) - set(self.candidates):
                raise ServerError(f"a profile's figures at {load.concurrency} in flight are of no candidate.")
        if not self.loads:
            raise ServerError("a profile without figures.")

    def winner(self, concurrency: int) -> str:
        """Return the best candidate at the measured load nearest to ``concurrency`` (by ratio)."""
        load = min(self.loads, key=lambda m: abs(_ratio(m.concurrency, concurrency)))
        return min(load.figures, key=lambda name: self._cost(load.figures[name]))

    def chosen(self, mode: Mode) -> str:
        """Return the candidate for a mode.

        latency: the best at the least load. throughput: the best at the highest. auto: of those measured at every load,
        the one whose worst loss against a load's best is the least; it also decides among those that are as good.
        """
        loads = sorted(self.loads, key=lambda load: load.concurrency)
        everywhere = [name for name in self.candidates if all(name in load.figures for load in loads)]
        if mode in ("latency", "throughput"):
            chosen = loads[0 if mode == "latency" else -1]
            limit = min(map(self._cost, chosen.figures.values())) * (1 + _AS_GOOD)
            near = [name for name in everywhere if self._cost(chosen.figures[name]) <= limit]
            return min(near, key=self._worst_loss) if near else self.winner(chosen.concurrency)
        return min(everywhere or [self.winner(loads[0].concurrency)], key=self._worst_loss)

    def against_fp16(self, name: str) -> dict[int, float]:
        """Return at each load how many times as fast as fp16 a candidate is."""
        return {
            load.concurrency: self._cost(load.fp16) / self._cost(load.figures[name])
            for load in self.loads
            if load.fp16 is not None and name in load.figures
        }

    def _worst_loss(self, name: str) -> float:
        best = [min(map(self._cost, load.figures.values())) for load in self.loads]
        return max(
            self._cost(load.figures[name]) / b for load, b in zip(self.loads, best, strict=True) if name in load.figures
        )

    def _cost(self, figure: float) -> float:
        """Return what is less for a better figure, in proportion."""
        return 1 / figure if _METRICS[self.metric] else figure

    def dumps(self) -> str:
        """Return the profile as JSON."""
        found = {
            "schema": _SCHEMA,
            "key": asdict(self.key),
            "metric": self.metric,
            "candidates": {name: settings.as_dict() for name, settings in self.candidates.items()},
            "loads": [asdict(load) for load in self.loads],
            "provenance": self.provenance,
        }
        return json.dumps(found, indent=1) + "\n"

    @classmethod
    def loads_text(cls, text: str, where: str) -> Profile:
        """Read a profile. Raises ServerError naming ``where`` for what is none."""
        try:
            found = json.loads(text)
            if found["schema"] != _SCHEMA:
                raise ServerError(f"schema {found['schema']} is not {_SCHEMA}.")
            return cls(
                Key(**found["key"]),
                {name: EngineSettings.read(value) for name, value in found["candidates"].items()},
                tuple(Measured(**load) for load in found["loads"]),
                found["metric"],
                found["provenance"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, ServerError) as error:
            raise ServerError(
                f"{where} is no profile ({error}). Make it anew with `qvl tune`, or delete it."
            ) from error


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def own_directory() -> Path:
    """Return where a user's own profiles lie."""
    return cache_dir("profiles")


def save(profile: Profile, directory: Path | None = None) -> Path:
    """Write a profile under a name made of its key, whole or not at all; return the file."""
    directory = directory or own_directory()
    directory.mkdir(parents=True, exist_ok=True)
    key = profile.key
    words = (key.card, key.model, key.format, f"tp{key.tp}", f"vllm-{key.vllm}")
    name = "_".join("".join(c if c.isalnum() or c in ".-+" else "-" for c in word) for word in words)
    path = directory / f"{name}.json"
    write_whole(path, profile.dumps())
    return path


@dataclass(frozen=True)
class Choice:
    """The settings to serve with, and what the user is told about them."""

    settings: EngineSettings
    notes: tuple[str, ...] = ()


def choose(mode: Mode, key: Key, directories: Sequence[Path] | None = None) -> Choice:
    """Find the profile for ``key`` and return its settings for ``mode``; vLLM's own settings where there is none.

    Args:
        directories: where profiles lie, the first that has one for the key counts. None: the user's own, then those
            that ship.
    """
    if as_mode(mode) == "off":
        return Choice(EngineSettings())
    near: list[Profile] = []
    notes: list[str] = []
    for directory in [own_directory(), _SHIPPED] if directories is None else directories:
        for path in sorted(directory.glob("*.json")):
            try:
                profile = Profile.loads_text(path.read_text(encoding="utf-8"), str(path))
            except (ServerError, OSError, UnicodeDecodeError) as error:
                notes.append(f"profile ignored: {error}")
                continue
            if profile.key == key:
                name = profile.chosen(mode)
                return Choice(profile.candidates[name], (*notes, *_told(profile, name, mode, path)))
            if (profile.key.model, profile.key.format) == (key.model, key.format):
                near.append(profile)
    for profile in near:
        notes.append(f"a profile of this model is ignored: it was measured on {_differs(profile.key, key)}")
    settings, why = usual(mode, key)
    if why:
        notes.append(f"{why}; `qvl tune` measures what is fastest here, --profile off leaves the choice to vLLM")
    elif near or mode != "auto":
        notes.append("vLLM's own settings are used; `qvl tune` measures what is fastest here")
    return Choice(settings, tuple(notes))


def usual(mode: Mode, key: Key) -> tuple[EngineSettings, str]:
    """Return what was measured best on a card's kind, for models and loads without a profile, and why, in words.

    On Hopper vLLM takes Machete for 4-bit weights. One H100, vLLM 0.32, a 7B with 1, 8, 32 and 128 in flight: ours gave
    1.43, 1.27, 1.12 and 1.01 of Machete's tokens/s. Of the others Humming is the fastest over all loads (one H200:
    1.16, 1.09, 1.06 and 0.99); our kernel hands more than 16 rows on to it. On other kinds nothing was measured: the
    choice is vLLM's.
    """
    if not (HOPPER.search(key.card) and key.format.startswith("awq")):
        return EngineSettings(), ""
    why = "no profile for this model: our kernel, the fastest on Hopper (a first start compiles for a minute or more)"
    return EngineSettings(kernel="qvl"), why


def _differs(found: Key, key: Key) -> str:
    other = [found.card] if found.card != key.card else []
    other += [f"vLLM {found.vllm}"] if found.vllm != key.vllm else []
    other += [f"{found.tp} GPUs"] if found.tp != key.tp else []
    return f"{' with '.join(other)}, this is {key.card} with vLLM {key.vllm}"


def _told(profile: Profile, name: str, mode: Mode, path: Path) -> list[str]:
    settings = profile.candidates[name]
    where = f"measured on {profile.key.card}; --profile off leaves it out ({path.name})"
    said = [f"profile {mode}: {name} ({settings}), {where}"]
    against = sorted(profile.against_fp16(name).items())
    if against and profile.key.format != "fp16":
        figures = ", ".join(f"{factor:.2f}x at {load}" for load, factor in against)
        what = "output tokens/s" if _METRICS[profile.metric] else "speed of a token"
        said.append(f"measured beside the 16-bit model: {figures} in flight ({what})")
    slower = [(load, factor) for load, factor in against if factor < 1]
    if slower and profile.key.format != "fp16":
        figures = ", ".join(f"{factor:.2f}x at {load}" for load, factor in slower)
        said.append(f"the 16-bit model was measured faster than this one ({figures} in flight): serve it where it fits")
    return said
