"""A process that has imported vLLM once, and becomes a server as often as tests boot one.

Importing vLLM is most of what a boot costs, and it is paid twice: in the API server, and in the engine that it spawns.
A zygote imports what both import, and forks at each boot: that server begins where `python -m serve.app.server` is
after its imports. What the product does stays: `lifecycle` prepares, watches and ends the server as ever; arguments,
environment, log and process group are what it asked for; the process runs the same module as "__main__"; its engine
is its child, in its process group.

    with Zygote() as zygote:
        monkeypatch.setattr(launch, "spawn", zygote.spawn(launch.spawn))

- A server is forked twice, so that it is left to the tests' process, which is its parent then (a subreaper for that
  moment): waiting, signals, /proc and the kernel's "die with your parent" are as with a child from Popen. It dies with
  them even where the product would let it live on.
- Nothing is forked that has threads. What vLLM spawns is forked early too: each server has children at hand from its
  beginning, which wait until vLLM spawns a process, and become that one with all that a spawned process is sent.
- vLLM, torch and others read some variables while they are imported. A server that is asked for with another
  environment than the zygote's is started the real way. So is all that a test starts by a command (`qvl serve`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import (
    context,
    forkserver,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from serve.process.launch import server_environment
from serve.settings.config import ServerConfig
from serve.settings.environment import DIE_WITH
from toolkit.paths import demo_checkpoint

#: As `launch.spawn`.
Spawn = Callable[[list[str], dict[str, str], Path, bool], "subprocess.Popen[bytes]"]

#: Imported beforehand, beside what they import: what an API server and its engine have imported when they answer.
MODULES = """
    serve.app.ready serve.app.requestlog serve.app.play serve.guard.app
    vllm.entrypoints.cli.benchmark.main vllm.entrypoints.cli.collect_env vllm.entrypoints.cli.download_kernels
    vllm.entrypoints.cli.launch vllm.entrypoints.cli.main vllm.entrypoints.cli.openai vllm.entrypoints.cli.preload
    vllm.entrypoints.cli.run_batch vllm.entrypoints.cli.serve vllm.entrypoints.cli.snapshot
    vllm.entrypoints.openai.api_server vllm.entrypoints.openai.models.api_router
    vllm.entrypoints.openai.chat_completion.api_router vllm.entrypoints.openai.chat_completion.batch_serving
    vllm.entrypoints.openai.completion.api_router vllm.entrypoints.openai.responses.api_router
    vllm.entrypoints.anthropic.api_router vllm.entrypoints.cohere.api_router vllm.entrypoints.generate.api_router
    vllm.entrypoints.generate.generative_scoring.api_router vllm.entrypoints.generate.structured_decisions.api_router
    vllm.entrypoints.scale_out.derender.api_router vllm.entrypoints.scale_out.render.api_router
    vllm.entrypoints.scale_out.token_in_token_out.api_router vllm.entrypoints.serve.elastic_ep.api_router
    vllm.entrypoints.serve.instrumentator.metrics vllm.entrypoints.serve.lora.api_router
    vllm.entrypoints.serve.profile.api_router vllm.entrypoints.serve.tokenize.api_router
    vllm.plugins.lora_resolvers.filesystem_resolver vllm.plugins.lora_resolvers.hf_hub_resolver
    vllm.renderers.hf vllm.transformers_utils.chat_templates vllm.utils.cpu_triton_utils
    vllm.distributed.elastic_ep.elastic_execute vllm.v1.engine.async_llm vllm.v1.engine.core
    vllm.v1.attention.backends.cpu_attn vllm.v1.core.sched.scheduler vllm.v1.metrics.loggers
    vllm.v1.executor.multiproc_executor vllm.v1.worker.cpu_worker
    vllm.model_executor.layers.quantization.online.base vllm.model_executor.models.qwen2_vl
    compressed_tensors jsonschema mistral_common model_hosting_container_standards.sagemaker
    prometheus_fastapi_instrumentator setproctitle transformers.models.qwen2_vl
    transformers.tokenization_mistral_common uvicorn.lifespan.on uvicorn.protocols.http.auto
    uvicorn.protocols.http.httptools_impl uvicorn.protocols.websockets.auto
    uvicorn.protocols.websockets.websockets_sansio_impl
"""
_PR_SET_CHILD_SUBREAPER = 36


#: Variables that make no other server: vLLM reads the first when it starts an engine, the second is that of kernels for
#: GPUs, and another one wherever a test has a cache of its own; `_environment` does what the last one asks for.
_READ_LATE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "HUMMING_CACHE_DIR",
    "PYTEST_CURRENT_TEST",
    "PROMETHEUS_MULTIPROC_DIR",
}
#: Variables that scikit-learn, OpenCV and torch set when they are imported, in the tests' process as in a server.
_SET_AT_IMPORT = {
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "LD_LIBRARY_PATH",
    "NVPL_BLAS_DEBUG_CPU_TYPE",
    "TORCHINDUCTOR_CACHE_DIR",
}


def _read_late(name: str) -> bool:
    """Whether this variable means nothing to a server while it is imported. Ours are all read when it runs."""
    return name.startswith("QVL_") or name in _READ_LATE | _SET_AT_IMPORT


def _given_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not _read_late(name)}


class Forked(subprocess.Popen[bytes]):
    """A child of this process that a zygote has forked."""

    def __init__(self, arguments: list[str], pid: int) -> None:
        # What Popen.__init__ sets, but for starting a process.
        self.args = arguments
        self.pid = pid
        self.returncode = None
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()
        self._child_created = True
        self._communication_started = False
        self._sigint_wait_secs = 0.25


class Zygote:
    """The tests' end. It starts the process when the first server is asked for, with that one's environment."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
        self._lock = threading.Lock()
        #: Variables for which servers were started the real way.
        self.differed: set[str] = set()
        #: What it prints.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115

    def spawn(self, really: Spawn) -> Spawn:
        """Return what takes the place of `launch.spawn`, which is given as ``really``."""

        def spawn(arguments: list[str], environment: dict[str, str], log: Path, attached: bool) -> Any:
            with self._lock:
                if sys.platform == "linux" and self._suits(environment):
                    # Attached or not: no test's server is to outlive the tests.
                    environment = {**environment, DIE_WITH: str(os.getpid())}
                    return self._fork(arguments, environment, log)
            return really(arguments, environment, log, attached)

        return spawn

    def _suits(self, environment: dict[str, str]) -> bool:
        if self._process is None:
            self._environment = _given_at_import(environment)
            self._connection, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__, str(theirs.fileno())],
                    env=self._environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._said,
                    stderr=self._said,
                    start_new_session=True,
                )
        given = _given_at_import(environment)
        self.differed |= {name for name in given | self._environment if given.get(name) != self._environment.get(name)}
        return given == self._environment

    def _fork(self, arguments: list[str], environment: dict[str, str], log: Path) -> Forked:
        asked = {
            "arguments": arguments,
            "environment": environment,
            "directory": str(Path.cwd()),
            "parent": os.getpid(),
        }
        with log.open("ab") as stream, _adopting():
            socket.send_fds(self._connection, [json.dumps(asked).encode() + b"\n"], [stream.fileno()])
            said = self._connection.recv(64)
            if not said:
                self._said.seek(0)
                raise RuntimeError(f"the zygote has ended: {self._said.read().decode(errors='replace')[-4000:]}")
        return Forked(["serve.app.server", *arguments], int(said))

    def run(self, code: str, *arguments: str) -> str:
        """Run a program where vLLM is imported already, as `python -c CODE ARGUMENTS`, and return what it prints."""
        environment = self._environment or server_environment(ServerConfig(), os.environ, "demo")
        with tempfile.TemporaryDirectory() as directory:
            said = Path(directory) / "said"
            with self._lock:
                assert self._suits(environment)
                process = self._fork(["-c", code, *arguments], environment, said)
            assert process.wait() == 0, said.read_text()[-4000:]
            return said.read_text()

    def close(self) -> None:
        """End the zygote; its servers go on."""
        if self._process is not None:
            self._connection.close()
            self._process.wait()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of descendants whose parent ends meanwhile."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


# ---- in the zygote --------------------------------------------------------------------------------------------------


def _import() -> None:
    """Import what a server imports, mended as it mends itself."""
    import importlib

    from serve.app import server
    from toolkit.compat import patch_torchvision

    gc.set_threshold(100_000, 50, 50)
    server._without_sklearn()
    server.answer_for_vllm()
    patch_torchvision()
    for name in MODULES.split():
        with contextlib.suppress(ModuleNotFoundError):  # where another release of vLLM has other modules
            importlib.import_module(name)
    import setproctitle
    from PIL import Image
    from transformers import AutoProcessor

    # It looks once where titles are kept, which it finds by the environment as the process was given it.
    setproctitle.setproctitle(setproctitle.getproctitle())
    Image.init()
    AutoProcessor.from_pretrained(demo_checkpoint())  # asks dozens of modules whether the processor is theirs
    gc.collect()
    gc.freeze()  # so that no collection writes into pages that all servers share
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose threads"


def main(connection: socket.socket) -> None:
    """Fork a server for each request, until the tests close the connection."""
    _import()
    while asked := _asked(connection):
        request, log = asked
        child = os.fork()
        if child == 0:
            between = os.getpid()
            if os.fork() > 0:
                os._exit(0)
            _wait_until_adopted(request["parent"], between)
            with connection:
                connection.sendall(b"%d" % os.getpid())
            _become_server(request, log)
            return
        os.close(log)
        os.waitpid(child, 0)


def _wait_until_adopted(parent: int, between: int) -> None:
    """Return when the parent is ``parent``, no more ``between``; end where that one ended first, or was interrupted."""
    while (now := os.getppid()) != parent:
        if now != between:
            os._exit(1)
        time.sleep(0.001)


def _asked(connection: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Return what is asked for and the log's file descriptor; None at the end."""
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    while data and not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return (json.loads(data), fds[0]) if data else None


def _become_server(request: dict[str, Any], log: int) -> None:
    """Be what `python -m serve.app.server ARGUMENTS` is, or `python -c`; returns when that ends."""
    os.setsid()
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)
    _environment(request["environment"])
    os.chdir(request["directory"])
    random.seed()
    if request["arguments"][0] == "-c":
        sys.argv = ["-c", *request["arguments"][2:]]
        exec(compile(request["arguments"][1], "<string>", "exec", dont_inherit=True), {"__name__": "__main__"})
        return
    sys.argv = ["server", *request["arguments"]]
    _spawn_from_spares(3 if _spread() else 1)
    runpy.run_module("serve.app.server", run_name="__main__", alter_sys=True)


def _environment(given: Mapping[str, str]) -> None:
    """Have this environment, and what is made of it when prometheus_client and our metrics are imported."""
    from prometheus_client import REGISTRY, values

    os.environ.clear()
    os.environ.update(given)
    if "PROMETHEUS_MULTIPROC_DIR" not in given:
        return
    values.ValueClass = values.get_value_class()  # in files of that directory
    for collector, names in list(REGISTRY._collector_to_names.items()):
        if any(name.startswith("qvl_") for name in names):
            REGISTRY.unregister(collector)
    for name in list(sys.modules):  # to be imported anew, with their metrics in files
        if name.partition(".")[0] == "serve":
            del sys.modules[name]


def _spread() -> bool:
    """Whether the server has more processes than its engine's: a coordinator and two engines, or two workers."""
    return not {"--tensor-parallel-size", "--data-parallel-size"}.isdisjoint(sys.argv)


def _spawn_from_spares(count: int) -> None:
    """Fork children that become the processes which this one spawns later; when they are used up, it spawns."""
    spares = [_spare() for _ in range(count)]

    def spawn(process_obj: Any) -> Any:
        return _Handed(process_obj, *spares.pop(0)) if spares else popen_spawn_posix.Popen(process_obj)

    context.SpawnProcess._Popen = staticmethod(spawn)  # type: ignore[method-assign]


def _spare() -> tuple[int, socket.socket]:
    """Fork a child that waits; returns its id and how to reach it. It ends when this process does."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os._exit(_become_spawned(theirs))
    theirs.close()
    return pid, ours


class _Handed(popen_forkserver.Popen):
    """A spawned process that a waiting child becomes. Sent as forkserver sends it; the child is ours, though."""

    _fds: list[int]
    poll = popen_fork.Popen.poll

    def __init__(self, process_obj: Any, pid: int, connection: socket.socket) -> None:
        self._spare, self._connection = pid, connection
        super().__init__(process_obj)

    def _launch(self, process_obj: Any) -> None:
        tracker = resource_tracker.getfd()
        assert tracker is not None
        data = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), data)
            reduction.dump(process_obj, data)
        finally:
            context.set_spawning_popen(None)
        self.pid = self._spare
        theirs, ours = os.pipe()
        self.sentinel, alive = os.pipe()
        with self._connection as connection:
            reduction.sendfds(connection, [theirs, alive, tracker, *self._fds])
            connection.sendall(json.dumps(dict(os.environ)).encode() + b"\n")  # to which vLLM has added since
        os.close(theirs)
        os.close(alive)
        self.finalizer = util.Finalize(self, _close, (os.dup(ours), self.sentinel))
        with os.fdopen(ours, "wb") as pipe:
            pipe.write(data.getbuffer())


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def _become_spawned(connection: socket.socket) -> int:
    """Wait until a process is spawned and be that one; returns its exit status."""
    with connection:
        _, fds, _, _ = socket.recv_fds(connection, 1, 64)
        if not fds:
            return 0  # nothing was
        environment = connection.makefile("rb").readline()
    _environment(json.loads(environment))
    _spawn_from_spares(2 if _spread() else 0)
    data, _, tracker, *inherited = fds
    forkserver._forkserver._inherited_fds = inherited  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
    return spawn._main(data, os.dup(data))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        main(end)
