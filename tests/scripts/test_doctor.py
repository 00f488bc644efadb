"""The doctor: every check reports, failures are named, and remedies are said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import doctor
from scripts.doctor import Finding

ROOT = Path(__file__).resolve().parents[2]


def test_this_machine_passes_and_every_check_is_listed():
    result = subprocess.run(
        [sys.executable, "-m", "scripts.doctor"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    for name in doctor.CHECKS:
        assert name in result.stdout


def test_a_failing_check_fails_the_doctor_and_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def broken() -> Finding:
        raise RuntimeError("no [such] thing")

    well = Finding(state="ok", detail="")
    monkeypatch.setattr(doctor, "CHECKS", {"well": lambda: well, "broken": broken})
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert "RuntimeError: no [such] thing" in output
    assert "1 of 2 checks failed: broken" in output


def test_a_missing_compiler_fails_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    finding = doctor.check_compiler()
    assert finding.state == "fail"
    assert "install gcc" in finding.remedy


def test_a_cache_open_to_others_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path))
    tmp_path.chmod(0o755)
    assert doctor.check_cache().state == "warn"
    tmp_path.chmod(0o700)
    assert doctor.check_cache().state == "ok"


def test_a_ray_without_token_or_with_a_public_one_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    token = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert doctor.check_ray_token().state == "ok"
    token.write_text("secret")
    token.chmod(0o644)
    assert doctor.check_ray_token().state == "warn"
    token.chmod(0o600)
    assert doctor.check_ray_token().state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.check_ray_token().state == "warn"


def test_a_container_with_fewer_cores_than_it_sees_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor.cgroup_cores(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cgroup_cores(tmp_path) is None
    monkeypatch.setattr(doctor, "cgroup_cores", lambda: 0.5)
    assert doctor.check_threads().state == "warn"


def test_a_small_dev_shm_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "free_bytes", lambda path: 64 * 2**20 if str(path) == "/dev/shm" else 2**40)
    finding = doctor.check_shared_memory()
    assert finding.state == "warn"
    assert "--shm-size" in finding.remedy
