"""What deploy/ builds on, under the real vLLM: metrics that its queries read, the production-stack's command line."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.http.images import sample_image
from serve.process import launch
from serve.process.launch import server_environment
from serve.process.lifecycle import Server
from serve.settings.arguments import vllm_arguments
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from tests.e2e.conftest import BOOT_SECONDS, Public, booted, free_port
from tests.unit.deploy.conftest import AT_REST, DEPLOY, UNDER_LOAD, alert_rules, load, panel_queries, scaling_queries
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.paths import demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("public")]
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "api-keys"
    path.write_text(KEY + "\n")
    return path


@dataclass
class Client:
    """Asks one server, with a key."""

    url: str
    key: str = KEY

    def get(self, path: str, key: str | None = "") -> httpx.Response:
        """Get a path with a key; "": this one's own, None: without."""
        key = self.key if key == "" else key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.get(self.url + path, headers=headers, timeout=30, trust_env=False)

    def ask(self, model: str, **settings: Any) -> httpx.Response:
        image = {"type": "image_url", "image_url": {"url": sample_image()}}
        content = [image, {"type": "text", "text": "What colour is the circle?"}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **settings}
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)

    def metrics(self) -> set[str]:
        return set(re.findall(r"^([a-zA-Z_:][\w:]*)[{ ]", self.get("/metrics").text, re.M))


def test_a_real_server_has_the_metrics_that_deploy_reads(public: Public) -> None:
    client = Client(public.url, public.keys[0])
    assert client.get("/ready", key=None).status_code == 200
    assert client.ask("demo").status_code == 200
    assert client.get("/v1/models", key="wrong").status_code == 401
    assert (AT_REST | UNDER_LOAD) - client.metrics() == set()


@pytest.fixture
def guarded(key_file: Path) -> Iterator[Server]:
    """A server as compose, Kubernetes and systemd run it, that has not been asked anything before."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    options = ServerConfig(port=free_port(), timeout=BOOT_SECONDS, guard=Limits(api_key_file=str(key_file)))
    with booted("demo", options) as server:
        yield server


@contextlib.contextmanager
def prometheus(directory: Path, server: str, key_file: Path) -> Iterator[str]:
    """A real Prometheus with the configuration of deploy/, that scrapes this server every second."""
    program = shutil.which("prometheus")
    assert program is not None
    (directory / "metrics-key").write_text(key_file.read_text().strip())
    (directory / "alerts.yml").write_text((DEPLOY / "prometheus" / "alerts.yml").read_text())
    settings = load(DEPLOY / "prometheus" / "prometheus.yml")
    settings["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    job = settings["scrape_configs"][0]
    job["authorization"]["credentials_file"] = str(directory / "metrics-key")
    job["static_configs"][0]["targets"] = [server.removeprefix("http://")]
    del job["dns_sd_configs"]  # nobody answers for qvl-fp16 here
    settings["scrape_configs"] = [job]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [program, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{address}/-/ready", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=20)


def test_every_query_of_dashboard_and_scaler_returns_data(guarded: Server, key_file: Path, tmp_path: Path) -> None:
    client = Client(guarded.url)
    with prometheus(tmp_path, guarded.url, key_file) as watcher:

        def value(query: str) -> list[Any]:
            answer = httpx.get(f"{watcher}/api/v1/query", params={"query": query}, trust_env=False).json()
            assert answer["status"] == "success", (query, answer)
            found: list[Any] = answer["data"]["result"]
            return found

        def scraped(times: int) -> None:
            """Wait until the server has been looked at so often more."""
            counted = "sum(count_over_time(up[10m]))"
            before = sum(int(sample["value"][1]) for sample in value(counted))
            deadline = time.monotonic() + 60
            while sum(int(sample["value"][1]) for sample in value(counted)) < before + times:
                assert time.monotonic() < deadline
                time.sleep(0.1)

        scraped(2)  # rates need one before
        for _ in range(4):
            assert client.ask(guarded.model_name).status_code == 200
            assert client.ask(guarded.model_name, n=1000).status_code == 400
            scraped(1)
        scraped(2)
        namespace = re.compile(r', namespace="qvl"')  # which a cluster adds
        queries = panel_queries() + [namespace.sub("", query) for query in scaling_queries()]
        empty = [query for query in queries if not value(query)]
        assert empty == []
        numbers = {query: [sample["value"][1] for sample in value(query)] for query in queries}
        # Nothing is 0 of something, never NaN: but for the probe, which is not asked while answers come.
        strange = [query for query, found in numbers.items() if any(number == "NaN" for number in found)]
        assert [query for query in strange if "qvl_probe_seconds" not in query] == []
        (reasons,) = [query for query in queries if query.startswith("sum by (reason)")]
        assert {sample["metric"]["reason"] for sample in value(reasons) if float(sample["value"][1]) > 0} == {"n"}
        loaded = httpx.get(f"{watcher}/api/v1/rules", trust_env=False).json()["data"]["groups"]
        assert {rule["name"] for group in loaded for rule in group["rules"]} == {r["alert"] for r in alert_rules()}
        assert {rule["health"] for group in loaded for rule in group["rules"]} == {"ok"}
        assert value('ALERTS{alertstate="firing"}') == []


@pytest.fixture
def stacked(key_file: Path, tmp_path: Path) -> Iterator[tuple[Client, subprocess.Popen[bytes]]]:
    """vLLM's own command line with the arguments and the environment that the chart makes of our values."""
    values = load(DEPLOY / "production-stack" / "values.yaml")["servingEngineSpec"]["modelSpec"][0]
    environment = {item["name"]: item["value"] for item in values["env"]}
    limits = Limits.loads(environment["QVL_GUARD"])
    environment["QVL_GUARD"] = environment["QVL_GUARD"].replace(str(limits.api_key_file), str(key_file))
    port = free_port()
    plain = ServerConfig(port=port, timeout=BOOT_SECONDS)
    for_a_cpu = {k: v for k, v in server_environment(plain, os.environ, "demo").items() if not k.startswith("QVL_")}
    ours = vllm_arguments(plain, Checkpoint.open(demo_checkpoint()), "demo")
    model, rest = ours[1], ours[ours.index("--dtype") :]
    for_a_cpu_too = [part for flag in ("--dtype", "--max-num-seqs", "--kv-cache-memory-bytes", "--max-model-len")
                     for part in rest[rest.index(flag) : rest.index(flag) + 2]]  # fmt: skip
    command = ["serve", model, "--host", "127.0.0.1", "--port", str(port), *for_a_cpu_too, "--enforce-eager"]
    log, files = tmp_path / "log", {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    process = launch.spawn(
        [*command, *values["vllmConfig"]["extraArgs"]], {**for_a_cpu, **environment, **files}, log, True
    )
    client = Client(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/ready", key=None).status_code == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield client, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_the_production_stacks_command_line_is_guarded_ready_and_drains(
    stacked: tuple[Client, subprocess.Popen[bytes]],
) -> None:
    client, process = stacked
    assert client.get("/v1/models", key=None).status_code == 401
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["qwen2-vl"]
    assert client.ask("qwen2-vl").status_code == 200
    refused = client.ask("qwen2-vl", n=1000)
    assert refused.status_code == 400 and "error" in refused.json()
    assert client.get("/docs").status_code == 404
    names = client.metrics()
    # Metrics in files leave out what describes a process, and what is looked up when they are asked for.
    known = {name for name in AT_REST | UNDER_LOAD if not name.startswith(("process_", "qvl_host_memory_"))}
    assert known - names == set()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
