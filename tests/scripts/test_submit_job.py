"""scripts/submit_job.sh: a clean checkout trains on a cluster of several nodes that asks for a token."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]
NODE = ["--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
KEY = "cat -- pyproject.toml scripts/constraints.txt scripts/set_up.py | cksum"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was committed, with this checkout's environment in place of one that takes minutes to make."""
    path = tmp_path_factory.mktemp("job") / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(path)], check=True)
    (path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (path / ".venv" / name).symlink_to(ROOT / ".venv" / name)
    key = subprocess.run(KEY, shell=True, cwd=path, capture_output=True, text=True, check=True).stdout  # noqa: S602
    (path / ".venv" / "stamp").write_text(f"{path} {key}")
    return path


@dataclass
class RayCluster:
    """A head and another node, each a `ray start` of its own, with a folder of its own as on machines of their own."""

    checkout: Path
    directory: Path
    job_server: str
    gcs_address: str
    folders: list[str] = field(default_factory=list)

    def environment(self, **variables: str) -> dict[str, str]:
        """Of whoever has the token."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.directory / "token")}
        return inherited | token | variables

    def start(self, *options: str) -> psutil.Popen:
        log = (self.directory / f"node-{len(list(self.directory.iterdir()))}.log").open("w")
        folder = tempfile.mkdtemp(prefix="ray-")  # short: paths of sockets are limited
        self.folders.append(folder)
        command = [str(self.checkout / "scripts" / "run"), "ray", "start", "--block", f"--temp-dir={folder}", *NODE]
        command += options
        return psutil.Popen(command, env=self.environment(), stdout=log, stderr=log, cwd=self.checkout)

    def submit(self, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.checkout / "scripts" / "submit_job.sh"), *options]
        environment = self.environment(RAY_API_SERVER_ADDRESS=self.job_server) | variables
        return subprocess.run(
            command, env=environment, cwd=self.directory, capture_output=True, text=True, check=False, timeout=400
        )


@pytest.fixture(scope="module")
def cluster(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    gcs_port, job_port, client_port, *agent_ports = free_ports(5)
    directory = tmp_path_factory.mktemp("cluster")
    cluster = RayCluster(checkout, directory, f"http://127.0.0.1:{job_port}", f"127.0.0.1:{gcs_port}")
    (directory / "token").write_text("0123456789abcdef" * 4)
    (directory / "token").chmod(0o600)
    head = ["--head", f"--port={gcs_port}", f"--dashboard-port={job_port}", f"--ray-client-server-port={client_port}"]
    processes = []
    try:
        processes.append(cluster.start(*head, f"--dashboard-agent-listen-port={agent_ports[0]}"))
        wait_until_answered(cluster.job_server, processes[0])
        joining = [f"--address={cluster.gcs_address}", f"--dashboard-agent-listen-port={agent_ports[1]}"]
        processes.append(cluster.start(*joining))
        yield cluster
    finally:
        for process in reversed(processes):
            end(process)
        for folder in cluster.folders:
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until_answered(url: str, server: psutil.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            requests.get(url, timeout=5)
            return
        except requests.ConnectionError:
            time.sleep(0.5)
    pytest.fail(f"nothing answers at {url}")


def end(process: psutil.Popen) -> None:
    """With `--block`, a node's processes end with the command that started them."""
    children = process.children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs([process, *children], timeout=30)
    for one in alive:
        one.kill()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": "e"}) + "\n" for i in range(16)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_clean_checkout_trains_as_a_job_on_several_nodes(
    cluster: RayCluster, tiny_model_dir: Callable[..., Path], data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    options = [
        f"--model={tiny_model_dir()}", f"--dataset={data}", "--reward=exact_match", f"--output-dir={run}",
        "--num-steps=2", "--num-prompts=4", "--group-size=4", "--max-tokens=2", "--num-engines=2", "--num-threads=1",
    ]  # fmt: skip
    job = cluster.submit(*options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert json.loads((run / "environment.json").read_text())["engine"]["num_engines"] == 2
    assert (run / "weights" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_the_right_token_nothing_is_submitted(cluster: RayCluster, tmp_path: Path):
    (tmp_path / "token").write_text("f" * 64)
    refused = cluster.submit("--num-steps=0", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
