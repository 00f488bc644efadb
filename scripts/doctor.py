"""Doctor: checks what Lockstep needs of this machine and says what to do; `scripts/run python -m scripts.doctor`.

Exit code 1 if something fails, 0 if all is well or only could be better.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "warn", "fail"]
STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}

GIB = 2**30
DEFAULT_MODEL_BYTES = 538_060_032  # SmolLM2-135M in float32
LEAST_DISK_BYTES = 4 * GIB
# Engine's weights; trainer's weights, masters, gradients and optimiser; the object store; three processes with torch.
LEAST_MEMORY_BYTES = 6 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found."""

    state: State
    detail: str
    remedy: str = ""


def main() -> int:
    console = Console()
    findings = examine()
    console.print(report(findings))
    failed = [name for name, finding in findings.items() if finding.state == "fail"]
    if failed:
        console.print(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}", style=STYLES["fail"])
        return 1
    num_warnings = sum(finding.state == "warn" for finding in findings.values())
    advice = f"; {num_warnings} could be better" if num_warnings else ""
    console.print(f"none of {len(findings)} checks failed{advice}", style=STYLES["ok"])
    return 0


def examine() -> dict[str, Finding]:
    """The findings of all checks, by name. A check that raises has failed, with its message as the finding."""
    findings: dict[str, Finding] = {}
    for name, check in CHECKS.items():
        try:
            findings[name] = check()
        except Exception as error:  # whatever goes wrong is what the user came to hear
            findings[name] = Finding(state="fail", detail=f"{type(error).__name__}: {error}")
    return findings


def report(findings: dict[str, Finding]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("state")
    table.add_column("what was found, and what to do", overflow="fold")
    for name, finding in findings.items():
        remedy = f"\n[bold]-> {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(name, f"[{STYLES[finding.state]}]{finding.state}[/]", escape(finding.detail) + remedy)
    return table


def check_packages() -> Finding:
    names = ("torch", "ray", "transformers", "accelerate")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return Finding(state="ok", detail=f"Python {sys.version.split()[0]}, {versions}")


def check_foreign_kernels() -> Finding:
    from engine.tokenizer import check_foreign_kernels as raise_if_present

    try:
        raise_if_present()
    except RuntimeError as error:
        return Finding(state="fail", detail=str(error), remedy="pip uninstall kernels")
    return Finding(state="ok", detail="no other distribution called `kernels` is installed")


def check_compiler() -> Finding:
    from kernels.build import find_compiler

    try:
        compiler = find_compiler()
    except RuntimeError as error:
        return Finding(
            state="fail", detail=str(error), remedy="install gcc or clang (Debian: apt-get install gcc), or set CC"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return Finding(state="ok", detail=f"{shutil.which(compiler)}: {version.splitlines()[0]}")


def check_cache() -> Finding:
    from kernels.build import cache_directory

    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    detail = f"{directory}, mode {stat.S_IMODE(status.st_mode):04o}, {free_bytes(directory) / GIB:.1f} GiB free"
    if status.st_uid != os.getuid():
        return Finding(
            state="fail",
            detail=f"{detail}, owned by user {status.st_uid}",
            remedy="set LOCKSTEP_CACHE to a directory of your own",
        )
    if status.st_mode & 0o077:
        return Finding(state="warn", detail=f"{detail}: others can look into it", remedy=f"chmod 700 {directory}")
    if free_bytes(directory) < LEAST_DISK_BYTES:
        return Finding(
            state="warn", detail=detail, remedy=f"free some space: a run wants {LEAST_DISK_BYTES // GIB} GiB"
        )
    return Finding(state="ok", detail=detail)


def check_kernels() -> Finding:
    import kernels

    kernels.self_test()
    return Finding(
        state="ok",
        detail=f"built for {kernels.instruction_set()}; self-test passed; fingerprint {kernels.fingerprint()}",
    )


def check_threads() -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_cores()
    if quota is not None and quota < cores:
        return Finding(
            state="warn",
            detail=f"{cores} cores are visible, but this container may use only {quota:g}",
            remedy=f"set num_threads={max(1, int(quota))} (--num-threads of the recipe)",
        )
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores:
        return Finding(
            state="warn",
            detail=f"OMP_NUM_THREADS={asked} with {cores} cores",
            remedy=f"unset it, or set it to {cores} at most",
        )
    load = os.getloadavg()[0]
    if load > cores / 2:
        return Finding(
            state="warn",
            detail=f"{cores} cores, but a load of {load:.1f}",
            remedy="other programs slow the run down; results stay the same",
        )
    return Finding(state="ok", detail=f"{cores} cores, load {load:.1f}, OMP_NUM_THREADS {asked or 'unset'}")


def check_memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < LEAST_MEMORY_BYTES:
        return Finding(
            state="warn", detail=detail, remedy=f"training the default model wants {LEAST_MEMORY_BYTES // GIB} GiB"
        )
    return Finding(state="ok", detail=detail)


def check_shared_memory() -> Finding:
    """Weights reach the engines through Ray's object store, which lies in /dev/shm."""
    from rollout.cluster import SHARED_MEMORY, plan_object_store

    free = free_bytes(SHARED_MEMORY)
    plan = plan_object_store(DEFAULT_MODEL_BYTES, free, free_bytes(tempfile.gettempdir()))
    if plan.warning:
        return Finding(state="warn", detail=plan.warning.partition(", so ")[0], remedy=plan.warning.rpartition(": ")[2])
    return Finding(
        state="ok",
        detail=f"{SHARED_MEMORY} has {free / GIB:.1f} GiB free; weight sync takes {plan.num_bytes / GIB:.1f} GiB",
    )


def check_ray_token() -> Finding:
    """A Ray cluster without token lets anybody who reaches its ports run programs."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if mode not in ("", "token"):
        return Finding(
            state="warn",
            detail=f"RAY_AUTH_MODE={mode}: whoever reaches this Ray's ports can run programs as you",
            remedy="unset RAY_AUTH_MODE, or keep the ports away from every network",
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding(state="ok", detail="token from RAY_AUTH_TOKEN")
    if not token.exists():
        return Finding(state="ok", detail=f"no token yet; a local Ray makes one in {token}")
    if token.stat().st_mode & 0o077:
        return Finding(state="warn", detail=f"{token} can be read by others", remedy=f"chmod 600 {token}")
    return Finding(state="ok", detail=f"token in {token}")


def check_ray_address() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    where = f"runs join the cluster at RAY_ADDRESS={address}" if address else "runs start a local Ray of their own"
    return Finding(state="ok", detail=where)


def check_model() -> Finding:
    from engine.checkpoint import model_path_of_package

    try:
        path = model_path_of_package()
    except ValueError as error:
        return Finding(state="warn", detail=str(error), remedy="or give --model a directory or hub id")
    return Finding(state="ok", detail=f"{path.name}, {path.stat().st_size / 2**20:.0f} MiB")


def free_bytes(path: str | Path) -> int:
    return shutil.disk_usage(path).free


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """How many cores' worth of time the container may use; None without a limit."""
    if (root / "cpu.max").exists():  # cgroup v2: "200000 100000" or "max 100000"
        quota, period = (root / "cpu.max").read_text().split()
    elif (root / "cpu/cpu.cfs_quota_us").exists():
        quota = (root / "cpu/cpu.cfs_quota_us").read_text().strip()
        period = (root / "cpu/cpu.cfs_period_us").read_text()
    else:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


CHECKS: dict[str, Callable[[], Finding]] = {
    "packages": check_packages,
    "foreign `kernels`": check_foreign_kernels,
    "C compiler": check_compiler,
    "cache directory": check_cache,
    "kernels": check_kernels,
    "threads": check_threads,
    "memory": check_memory,
    "shared memory": check_shared_memory,
    "Ray's token": check_ray_token,
    "Ray cluster": check_ray_address,
    "packaged model": check_model,
}


if __name__ == "__main__":
    sys.exit(main())
