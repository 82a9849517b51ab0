"""What a user names as a model, as a directory on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.checkpoint.checkpoint import WHAT_TO_GIVE
from toolkit.errors import CheckpointError
from toolkit.paths import demo_checkpoint

__all__ = ["resolve"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$")


def resolve(model: str, revision: str | None = None) -> Path:
    """Turn ``DIR``, ``HUB_ID`` or ``demo`` into a local directory; a hub model is fetched if it is not here yet.

    ``demo`` is the embedded model (a directory of that name is ``./demo``). What exists on disk is a directory, and
    so is what begins with ``/``, ``./``, ``../`` or ``~``; any other ``org/name`` is looked up on the hub.

    Args:
        model: what the user wrote.
        revision: branch, tag or commit of a hub model.

    Raises CheckpointError for a missing directory, HubError for a model that can't be fetched.
    """
    if model == "demo":
        _refuse_revision(model, revision)
        return demo_checkpoint()
    if not model.strip():
        raise CheckpointError(f"no model was given. {WHAT_TO_GIVE}")
    path = Path(model).expanduser()
    if path.exists():
        _refuse_revision(model, revision)
        return path
    if _HUB_ID.match(model) and not model.startswith(("./", "../", "/", "~")):
        from toolkit.sources.hub import fetch

        return fetch(model, revision)
    raise CheckpointError(f"no such directory: {model}. {WHAT_TO_GIVE}")


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise CheckpointError(f"--revision {revision} only applies to a model from the hub, and {model} is local.")
