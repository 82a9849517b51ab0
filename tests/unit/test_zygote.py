"""Which servers the end-to-end tests fork, and which they start the real way."""

from __future__ import annotations

import socket
import subprocess
import sys

from tests.support.zygote import Zygote


def test_a_server_with_another_environment_is_not_forked() -> None:
    with Zygote() as zygote:
        zygote._environment = {"PATH": "/bin"}
        zygote._connection, theirs = socket.socketpair()
        theirs.close()
        zygote._process = subprocess.Popen([sys.executable, "-c", ""])
        cache = {"QVL_CACHE": "/c", "HUMMING_CACHE_DIR": "/c/humming"}
        imported = {"LD_LIBRARY_PATH": "/cv2", "TORCHINDUCTOR_CACHE_DIR": "/tmp/t", "KMP_INIT_AT_FORK": "FALSE"}
        assert zygote._suits({"PATH": "/bin", **cache, **imported})
        assert zygote.differed == set()
        assert not zygote._suits({"PATH": "/bin", "VLLM_USE_V2_MODEL_RUNNER": "1"})
        assert not zygote._suits({})
        assert zygote.differed == {"PATH", "VLLM_USE_V2_MODEL_RUNNER"}
