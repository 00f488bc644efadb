"""Cluster: starts a local Ray or joins the one in RAY_ADDRESS, with an object store that holds what goes through it."""

from __future__ import annotations

import math
import os
import shutil
import site
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from safetensors import safe_open

from rollout import logs

SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20
GIB = 2**30
USABLE_SHARE = 0.95  # of /dev/shm's free memory, as Ray itself reckons
ROLLOUT_BYTES = 256 * MIB  # what prompts and rollouts in transit may take
# Above this size Ray refuses an object store outside shared memory unless told otherwise.
RAY_SLOW_STORAGE_LIMIT = 10**10
SLOW_STORAGE_OPTION = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
SOURCE_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStorePlan:
    """How large Ray's object store is made, and what the user should hear about it."""

    num_bytes: int
    warning: str | None


def weights_num_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's weights once they are float32, from the headers of its safetensors files."""
    num_values = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                num_values += _num_values(file.get_slice(name).get_shape())
    return 4 * num_values


def _num_values(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def plan_object_store(weights_bytes: int, shared_memory_bytes: int, disk_bytes: int) -> ObjectStorePlan:
    """Size for rollouts and the weights of one sync, better two: the last one's memory is given back a little later.

    `weights_bytes` is 0 where weights travel by other means.
    `shared_memory_bytes` and `disk_bytes` are what /dev/shm and Ray's folder have free. Where /dev/shm is too small
    (64 MB in many containers) the store goes to disk, with a warning; RuntimeError says what to do if that fails too.
    """
    least = weights_bytes + weights_bytes // 10 + ROLLOUT_BYTES
    usable = int(shared_memory_bytes * USABLE_SHARE)
    if usable >= least:
        return ObjectStorePlan(num_bytes=min(usable, least + weights_bytes), warning=None)
    remedy = f"give the container more of it (docker run --shm-size={math.ceil(least / USABLE_SHARE / GIB)}g)"
    shortage = f"/dev/shm has {shared_memory_bytes / MIB:.0f} MiB free and the object store needs {least / MIB:.0f} MiB"
    if disk_bytes < least:
        raise RuntimeError(f"{shortage}; {tempfile.gettempdir()} has only {disk_bytes / MIB:.0f} MiB: {remedy}")
    if least > RAY_SLOW_STORAGE_LIMIT and not os.environ.get(SLOW_STORAGE_OPTION):
        raise RuntimeError(f"{shortage}: {remedy}, or set {SLOW_STORAGE_OPTION}=1 to use the disk, which is slow")
    return ObjectStorePlan(num_bytes=least, warning=f"{shortage}, so it lies on the slower disk: {remedy}")


def connect(weights_bytes: int, num_cpus: int) -> bool:
    """Makes sure that this process is connected to Ray. Returns whether a local Ray was started for that.

    weights_bytes: that go through Ray's object store in one sync.
    """
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        _join(os.environ["RAY_ADDRESS"], weights_bytes)
        return False
    _start_local(weights_bytes, num_cpus)
    return True


def disconnect() -> None:
    """Ends the local Ray that `connect` started, and waits for its processes."""
    ray.shutdown(wait_for_processes=True)


def actor_env(num_threads: int) -> dict[str, dict[str, str]]:
    """Ray's runtime_env of an actor that computes: its threads, explicitly (Ray would set one), where our packages are,
    and how it logs. torch's threads sleep between two operations: while they poll, as is their habit, the kernels' own
    lack a core.
    """
    threads = {name: str(num_threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {"env_vars": {**threads, "OMP_WAIT_POLICY": "PASSIVE", **logs.worker_env(), **_import_path()}}


def helper_env() -> dict[str, dict[str, str]]:
    """Ray's runtime_env of an actor that computes nothing: where our packages are, and how it logs. Where neither
    needs saying it is empty, and Ray takes one of the processes that it holds ready.
    """
    variables = {**logs.worker_env(), **_import_path()}
    return {"env_vars": variables} if variables else {}


def _import_path() -> dict[str, str]:
    """PYTHONPATH for workers, where they would not find our packages by themselves.

    They do where the packages are installed, and in the driver's working directory, which Ray gives to workers (a
    submitted job starts in the one that was sent along).
    """
    is_installed = any(Path(path) == SOURCE_ROOT for path in site.getsitepackages())
    if is_installed or Path.cwd() == SOURCE_ROOT:
        return {}
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([str(SOURCE_ROOT), *others])}


def _join(address: str, weights_bytes: int) -> None:
    try:
        ray.init(**_init_options())
    except ConnectionError as error:
        hint = "" if os.environ.get("RAY_AUTH_MODE") else "; if it wants a token, set RAY_AUTH_MODE=token"
        raise ConnectionError(
            f"no Ray answers at RAY_ADDRESS={address}: check that it runs, or unset RAY_ADDRESS to start one here{hint}"
        ) from error
    _warn_of_small_store(weights_bytes)


def _start_local(weights_bytes: int, num_cpus: int) -> None:
    plan = plan_object_store(
        weights_bytes, shutil.disk_usage(SHARED_MEMORY).free, shutil.disk_usage(tempfile.gettempdir()).free
    )
    if plan.warning:
        warnings.warn(plan.warning, stacklevel=2)
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=plan.num_bytes,
        **_init_options(),
    )


def _init_options() -> dict[str, Any]:
    # failures reach the caller as exceptions; RAY_LOG_TO_DRIVER=1 shows what the actors print as well
    options: dict[str, Any] = {
        "logging_level": "ERROR",
        "log_to_driver": os.environ.get("RAY_LOG_TO_DRIVER", "0") == "1",
    }
    if _import_path():
        options["runtime_env"] = {"env_vars": _import_path()}
    return options


def _warn_of_small_store(weights_bytes: int) -> None:
    store_bytes = ray.cluster_resources().get("object_store_memory", 0)
    if store_bytes < weights_bytes:
        warnings.warn(
            f"the cluster's object store holds {store_bytes / MIB:.0f} MiB and one weight sync needs "
            f"{weights_bytes / MIB:.0f} MiB: start Ray with a larger --object-store-memory",
            stacklevel=3,
        )
