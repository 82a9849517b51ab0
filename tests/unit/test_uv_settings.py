"""pip's settings as uv's: what install.sh hands to uv."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SPEC = importlib.util.spec_from_file_location("uv_settings", ROOT / "requirements" / "uv_settings.py")
assert SPEC is not None and SPEC.loader is not None
uv_settings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(uv_settings)


def test_nothing_set_is_nothing_to_say() -> None:
    """Plain PyPI."""
    assert uv_settings.translate("") == {}


def test_a_mirror_with_wheels_beside_it() -> None:
    """Several indexes on one line or on several, as pip.conf may have them; a variable holds over a file."""
    listed = (
        "global.index-url='https://mirror.example/simple'\n"
        "global.extra-index-url='https://a.example/simple\\nfile:///b/simple'\n"
        "global.find-links='/wheels /more'\n"
        "install.trusted-host='a.example'\n"
        "global.timeout='15'\n"
        ":env:.timeout='60'\n"
        ":env:.disable-pip-version-check='1'\n"
    )
    assert uv_settings.translate(listed) == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple file:///b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "a.example",
        "UV_HTTP_TIMEOUT": "60",
    }


@pytest.mark.parametrize("listed", ["global.no-index='true'", "global.proxy='http://p'", "download.timeout='9'"])
def test_what_uv_could_not_honour_is_left_to_pip(listed: str) -> None:
    """Better slow than from the wrong place."""
    with pytest.raises(ValueError, match=listed.partition("=")[0]):
        uv_settings.translate(listed)


def test_the_script_prints_what_a_shell_reads(capfd: pytest.CaptureFixture[str]) -> None:
    """Run as install.sh runs it; on a machine whose pip has other settings it says which, with code 1."""
    code = subprocess.call([sys.executable, str(ROOT / "requirements" / "uv_settings.py")])
    said = capfd.readouterr()
    if code:
        assert "no setting of uv's for" in said.err
    else:
        assert all(line.startswith("export ") for line in said.out.splitlines())
        assert "UV_INDEX_STRATEGY" in said.out
