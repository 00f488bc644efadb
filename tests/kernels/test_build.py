from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kernels import build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own that holds the fast build."""
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCKSTEP_ISA", raising=False)
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def built(cache, monkeypatch):
    """A library in the cache, by a stand-in for the compiler that is quick."""
    monkeypatch.setattr(build.subprocess, "run", _quick_compiler)
    return build.library_path("generic")


def _quick_compiler(command, **options):
    if "-o" in command:
        with open(command[command.index("-o") + 1], "wb") as product:
            product.write(b"a library")
    return subprocess.CompletedProcess(command, 0, stdout="version 1", stderr="")


def test_the_cache_is_private_and_reused(built, monkeypatch):
    assert built.read_bytes() == b"a library"
    assert built.parent.stat().st_mode & 0o777 == 0o700
    assert built.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert build.library_path("generic") == built


def test_leftovers_of_the_build_are_gone(built):
    assert sorted(file.name for file in built.parent.iterdir()) == sorted(
        [built.name, built.with_suffix(".sha256").name]
    )


@pytest.mark.parametrize("mode", [0o660, 0o602])
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_a_library_that_others_may_write_is_refused(built, mode, suffix):
    built.with_suffix(suffix).chmod(mode)
    with pytest.raises(RuntimeError, match="may be written by other users") as raised:
        build.library_path("generic")
    assert str(built.with_suffix(suffix)) in str(raised.value)
    assert "LOCKSTEP_CACHE" in str(raised.value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_a_library_of_somebody_else_is_refused(built):
    os.chown(built, 12345, -1)
    with pytest.raises(RuntimeError, match="owner 12345"):
        build.library_path("generic")


def test_a_cache_directory_that_was_open_is_closed(built):
    built.parent.chmod(0o777)
    build.library_path("generic")
    assert built.parent.stat().st_mode & 0o777 == 0o700


def test_a_damaged_library_is_refused(built):
    built.write_bytes(b"a librarY")
    with pytest.raises(RuntimeError, match="is damaged"):
        build.library_path("generic")
    built.unlink()
    assert build.library_path("generic").read_bytes() == b"a library"  # what the message advises


def test_a_failed_build_shows_the_compilers_words_and_leaves_nothing(cache, monkeypatch):
    def failing(command, **options):
        return subprocess.CompletedProcess(command, int("-o" in command), stdout="", stderr="no such thing")

    monkeypatch.setattr(build.subprocess, "run", failing)
    with pytest.raises(RuntimeError, match="no such thing"):
        build.library_path("generic")
    assert list(cache.iterdir()) == []


def test_sources_flags_and_compiler_are_part_of_the_name(built, cache, monkeypatch, tmp_path):
    names = {built.name}
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
        names.add(build.library_path("generic").name)
    with monkeypatch.context() as patch:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "other.c").write_text("int x;")
        patch.setattr(build, "SOURCE_DIRECTORY", tmp_path / "sources")
        names.add(build.library_path("generic").name)
    names.add(build.library_path("avx2").name)
    assert len(names) == 4


def test_no_fast_math_and_no_contraction():
    assert "-ffp-contract=off" in build.FLAGS
    assert not [flag for flag in build.FLAGS if "fast" in flag or "unsafe" in flag]


def test_a_machine_without_a_compiler_is_told_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="install gcc or clang"):
        build.library_path("generic")


def test_the_instruction_set_is_checked(monkeypatch):
    monkeypatch.setenv("LOCKSTEP_ISA", "sse9")
    with pytest.raises(ValueError, match="LOCKSTEP_ISA='sse9' must be one of avx512bf16, avx512, avx2, generic"):
        build.best_instruction_set()
    monkeypatch.setattr(build, "_processor_flags", lambda: {"avx2", "fma", "bmi2", "f16c"})
    monkeypatch.setenv("LOCKSTEP_ISA", "avx512")
    with pytest.raises(ValueError, match="more than this processor runs: avx2, generic"):
        build.best_instruction_set()
    monkeypatch.delenv("LOCKSTEP_ISA")
    assert build.best_instruction_set() == "avx2"
    monkeypatch.setattr(build, "_processor_flags", set)
    assert build.best_instruction_set() == "generic"


def test_processes_that_build_at_once_agree(tmp_path):
    """Two fresh processes with one empty cache: whoever comes last must not leave a seal that does not fit."""
    environment = {**os.environ, "LOCKSTEP_CACHE": str(tmp_path / "cache")}
    (tmp_path / "one.c").write_text("int one(void) { return 1; }")
    code = f"""
from pathlib import Path
from kernels import build
build.SOURCE_DIRECTORY = Path({str(tmp_path)!r})
build._build_key = lambda *_: "one"
build.library_path("generic")
"""
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
