"""Builds the C kernels once per source, compiler and instruction set, into a private cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCE_DIRECTORY = Path(__file__).parent / "csrc"
# -ffp-contract=off: a multiply and an add stay two roundings unless the source says FMA. No fast-math of any kind.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma"}
INSTRUCTION_SETS = {  # name -> (compiler flags, what /proc/cpuinfo must list), fastest first
    "avx512bf16": (("-march=x86-64-v4", "-mavx512bf16"), {*_AVX512, "avx512_bf16"}),
    "avx512": (("-march=x86-64-v4",), _AVX512),
    "avx2": (("-march=x86-64-v3",), {"avx2", "fma", "bmi2", "f16c"}),
    "generic": ((), set()),
}


def best_instruction_set() -> str:
    """The fastest build that this processor runs; LOCKSTEP_ISA overrides it. The bits are the same in each."""
    forced = os.environ.get("LOCKSTEP_ISA")
    if forced:
        if forced not in INSTRUCTION_SETS:
            raise ValueError(f"LOCKSTEP_ISA={forced!r} must be one of {', '.join(INSTRUCTION_SETS)}")
        if forced not in available_instruction_sets():
            raise ValueError(
                f"LOCKSTEP_ISA={forced!r} is more than this processor runs: {', '.join(available_instruction_sets())}"
            )
        return forced
    return available_instruction_sets()[0]


def available_instruction_sets() -> list[str]:
    """The builds that this processor can run, fastest first."""
    flags = _processor_flags()
    return [name for name, (_, needed) in INSTRUCTION_SETS.items() if needed <= flags]


def library_path(instruction_set: str) -> Path:
    """The checked shared library for an instruction set, built now if it is not in the cache.

    Raises:
        RuntimeError: no C compiler, a failed build, or a cache that somebody else may write to.
    """
    directory = cache_directory() / "kernels"
    _make_private(directory)
    compiler = find_compiler()
    path = directory / f"lockstep-{instruction_set}-{_build_key(compiler, instruction_set)}.so"
    if not path.exists():
        _build(compiler, instruction_set, path)
    _check_trusted(path)
    return path


def cache_directory() -> Path:
    """LOCKSTEP_CACHE, else ~/.cache/lockstep (under XDG_CACHE_HOME where that is set)."""
    if os.environ.get("LOCKSTEP_CACHE"):
        return Path(os.environ["LOCKSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lockstep"


def find_compiler() -> str:
    """The C compiler: $CC, cc, gcc or clang."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise RuntimeError(
        "no C compiler found (looked for $CC, cc, gcc, clang): Lockstep builds its CPU kernels on first use; "
        "install gcc or clang, or set CC to one"
    )


def _processor_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()


def _build_key(compiler: str, instruction_set: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest.update(repr((FLAGS, INSTRUCTION_SETS[instruction_set][0], version, platform.machine())).encode())
    for source in sorted(SOURCE_DIRECTORY.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _build(compiler: str, instruction_set: str, path: Path) -> None:
    sources = sorted(str(source) for source in SOURCE_DIRECTORY.glob("*.c"))
    flags = [*FLAGS, *INSTRUCTION_SETS[instruction_set][0]]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # beside the target, so that the move is atomic
        product = Path(scratch) / path.name
        command = [compiler, *flags, "-o", str(product), *sources, "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"building the C kernels failed: {' '.join(command)}\n{result.stderr}")
        product.chmod(0o600)
        seal = Path(scratch) / "seal"
        seal.write_text(_content_hash(product))
        seal.chmod(0o600)
        seal.replace(_seal_path(path))
        product.replace(path)


def _check_trusted(path: Path) -> None:
    """Refuses a library that another user could have written, or whose bytes are not those that were built."""
    for file in (path.parent, path, _seal_path(path)):
        status = file.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise RuntimeError(
                f"{file} may be written by other users (owner {status.st_uid}, mode {stat.filemode(status.st_mode)}): "
                "refusing to load code from it; delete it, or set LOCKSTEP_CACHE to a directory of your own"
            )
    if _content_hash(path) != _seal_path(path).read_text():
        raise RuntimeError(
            f"{path} is damaged (its hash is not the one recorded when it was built): delete it and try again"
        )


def _seal_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _content_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid == os.getuid():
        directory.chmod(0o700)


if __name__ == "__main__":
    name = best_instruction_set()
    print(f"C kernels ({name}): {library_path(name)}")
