"""Prints pip's settings as shell assignments of uv's, which reads none of pip's files and variables.

    eval "$(python requirements/uv_settings.py)"

Ends with code 1 where pip is told something that is not translated here: then pip itself is the one to ask.
"""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys

#: uv's variable for each of pip's settings, and what stands between several values; None: no matter to uv.
NAMES: dict[str, tuple[str, str] | None] = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "retries": ("UV_HTTP_RETRIES", " "),
    "disable-pip-version-check": None,
    "no-input": None,
    "progress-bar": None,
    "root-user-action": None,
}


def translate(listed: str) -> dict[str, str]:
    """Return uv's variables for what `pip config list` says; of a setting that is there twice, the last holds.

    Raises:
        ValueError: a setting that uv has no variable for, or that is for one command of pip alone.
    """
    found = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section not in ("global", "install", ":env:") or name not in NAMES:
            raise ValueError(f"no setting of uv's for {key}")
        variable = NAMES[name]
        if variable is not None:
            found[variable[0]] = variable[1].join(str(ast.literal_eval(value)).split())
    return found


if __name__ == "__main__":
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    try:
        settings = translate(listing.stdout)
    except ValueError as error:
        sys.exit(str(error))
    # as pip does: the best version of any index, not the first index that has the name
    for name, value in {"UV_INDEX_STRATEGY": "unsafe-best-match", **settings}.items():
        print(f"export {name}={shlex.quote(value)}")
