"""Flags of vLLM's that a user may not add: those that say what an option here says, and those that undo the guard."""

from __future__ import annotations

from toolkit.errors import ServerError

__all__ = ["check_flag"]

#: vLLM flags that say what an option here says already: two answers would be one too many.
_OWN = {
    "--api-key": "--api-key",
    "--host": "--host",
    "--log-config-file": "--log-format",
    "--logging-config": "--log-format",
    "--lora-modules": "--lora",
    "--max-model-len": "--max-model-len",
    "--model": "MODEL",
    "--port": "--port",
    "--served-model-name": "--served-model-name",
    "--shutdown-timeout": "--drain",
    "--ssl-certfile": "--ssl-certfile",
    "--ssl-keyfile": "--ssl-keyfile",
    "--uds": "--host and --port",
}
#: vLLM flags that can't be, and why.
_IMPOSSIBLE = {
    "--ssl-cert-reqs": "qvl asks the server whether it is ready, and has no certificate of its own; let a proxy ask "
    "clients for theirs",
}
#: vLLM flags that would undo the guard, and how.
_UNGUARDED = {
    "--allowed-local-media-path": "requests could name files of this machine",
    "--allowed-media-domains": "the guard fetches images itself, from the hosts that --image-host names",
    "--api-server-count": "each process would count rates and requests under way for itself",
    "--config": "a file could hold any of the flags that are refused here",
    "--enable-log-outputs": "answers would be in the log",
    "--enable-log-requests": "prompts would be in the log",
    "--enable-offline-docs": "its pages are for developers",
    "--grpc": "no guard stands before it",
    "--grpc-port": "no guard stands before it",
    "--headless": "nothing would answer",
    "--middleware": "it would stand before the guard",
    "--omni": "it is another server",
    "--root-path": "the guard tells routes by their path",
    "--trust-request-chat-template": "requests could bring templates of their own",
    "--trust-request-mm-kwargs": "requests could override the limits on images",
}


def check_flag(argument: str, *, guarded: bool) -> None:
    """Raise ServerError for a flag of vLLM's that says what an option here says, or would undo the guard."""
    if not argument.startswith("--"):
        return
    flag = argument.partition("=")[0].replace("_", "-")
    for own, ours in _OWN.items():
        if _means(flag, own):
            raise ServerError(f"{flag} after -- : use qvl's own {ours} instead.")
    for impossible, why in _IMPOSSIBLE.items():
        if _means(flag, impossible):
            raise ServerError(f"{flag} after -- can't be: {why}.")
    for unguarded, why in _UNGUARDED.items() if guarded else ():
        if _means(flag, unguarded):
            raise ServerError(f"{flag} after -- would undo the guard: {why}.")


def _means(given: str, flag: str) -> bool:
    """Whether vLLM takes what is given for this flag: it completes flags that are cut short."""
    return given == flag or (len(given) > 4 and flag.startswith(given))
