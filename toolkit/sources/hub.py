"""Fetching a model from the Hugging Face hub: only the files a server needs, into the hub's own cache.

Endpoint, cache, token and offline mode come from where huggingface_hub looks for them (``HF_ENDPOINT``, ``HF_HOME``,
``HF_TOKEN`` or `hf auth login`, ``HF_HUB_OFFLINE``). A dropped connection is taken up at the byte where it broke; after
a killed run the files that were whole are kept and the others are fetched again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from toolkit.console import note
from toolkit.errors import HubError, ResourceError
from toolkit.files import free_bytes
from toolkit.units import human_bytes

__all__ = ["fetch"]

#: What a Qwen2-VL repository needs to be loaded: weights, configs, tokenizer and processor, templates, licence.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*"]
#: Other formats' copies live in subdirectories (onnx/, original/, ...).
_UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/*.model"]


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """Return the local snapshot of ``hub_id`` at ``revision`` (default ``main``), fetching what is not cached.

    With the hub out of reach, a complete snapshot in the cache is used.

    Raises HubError when the model or revision does not exist, is gated, or can't be reached and is not cached;
    ResourceError when the cache's disk is too small.
    """
    from huggingface_hub import constants, snapshot_download

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    with _explained(hub_id, revision, endpoint):
        _announce(hub_id, revision, endpoint, cache)
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                endpoint=endpoint,
                cache_dir=cache,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
            )
        )


def _announce(hub_id: str, revision: str | None, endpoint: str, cache: Path) -> None:
    """Say what will be downloaded, and stop now if the disk has no room for it. Silent when the hub is out of reach."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = HfApi(endpoint=endpoint).model_info(hub_id, revision=revision, files_metadata=True)
    except (_http_error(), OfflineModeIsEnabled):
        return  # snapshot_download falls back on the cache, or says why it can't
    missing = [
        sibling.size or 0
        for sibling in info.siblings or []
        if _wanted(sibling.rfilename)
        and not isinstance(try_to_load_from_cache(hub_id, sibling.rfilename, cache, info.sha), str)
    ]
    if not missing:
        return
    needed, free = sum(missing), free_bytes(cache)
    if needed > free:
        raise ResourceError(
            f"{hub_id} needs {human_bytes(needed)} more in {cache}, which has {human_bytes(free)} free. "
            "Free some space, or set HF_HOME to a directory on a larger disk."
        )
    note(f"fetching {hub_id}: {len(missing)} files, {human_bytes(needed)}, to {cache}")


def _wanted(name: str) -> bool:
    return any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _UNWANTED)


@contextmanager
def _explained(hub_id: str, revision: str | None, endpoint: str) -> Iterator[None]:
    """Turn huggingface_hub's errors into one message that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{hub_id} is gated: ask for access at {endpoint}/{hub_id}, "
            "then log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{hub_id} is neither a directory here nor a model on {endpoint}. Check the spelling; "
            "for a private model, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{hub_id} has no revision {revision}: give a branch, tag or full commit hash listed at "
            f"{endpoint}/{hub_id}/tree/main."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{hub_id} is no directory here, is not (completely) in the cache, and {endpoint} "
            f"{_why(error.__cause__)}. Run again when that has changed: what is fetched already is kept."
        ) from error
    except (errors.HFValidationError, errors.DisabledRepoError) as error:
        raise HubError(f"{hub_id} can't be fetched: {_first_line(error)}.") from error
    except (_http_error(), OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"disk full while {hub_id} was fetched: free some space, "
                "or set HF_HOME to a directory on a larger disk."
            ) from error
        raise HubError(
            f"{hub_id} could not be fetched from {endpoint}: {_first_line(error)}. "
            "Run again: what is fetched already is kept."
        ) from error


def _http_error() -> type[Exception]:
    """Return the base of all transport errors: httpx's in huggingface_hub 1, httpx2's in 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))


def _why(error: BaseException | None) -> str:
    """Say why the hub gave no answer that could be used."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return f"answers with status {error.response.status_code}"
    if error is None or isinstance(error, OfflineModeIsEnabled):
        return "is not asked, as HF_HUB_OFFLINE is set"
    return "can't be reached"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
