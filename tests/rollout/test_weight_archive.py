from __future__ import annotations

from dataclasses import replace

import pytest

from engine import LLMEngine
from rollout.journal import JournalError
from rollout.weight_archive import WeightArchive


def test_kept_weights_are_models_of_their_own(tmp_path, config, make_weights):
    archive = WeightArchive(tmp_path, config.model, keep_weights_every=3, keep_last=2)
    paths = {version: archive.save(version, iter(make_weights(version).items())) for version in range(10)}
    assert [version for version, path in paths.items() if path] == [3, 6, 9]
    assert archive.retained() == {version: tmp_path / "weights" / f"v00000{version}" for version in (6, 9)}
    engine = LLMEngine(config)
    checksum = engine.update_weights(make_weights(6), 6).checksum
    kept = LLMEngine(replace(config, model=str(paths[6])))
    assert kept.weights_checksum == checksum
    assert kept.tokenizer is not None
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o700


def test_a_version_that_comes_again_replaces_the_old_one_and_stays(tmp_path, config, make_weights):
    archive = WeightArchive(tmp_path, config.model, keep_last=1)
    archive.save(5, make_weights(1))
    path = archive.save(2, make_weights(2))
    assert archive.retained() == {2: path}, "after a rollback the newest has the lower number"
    (path.parent / ".v000002-of-a-killed-process").mkdir()
    archive.save(2, make_weights(3))
    checksum = LLMEngine(config).update_weights(make_weights(3), 2).checksum
    assert LLMEngine(replace(config, model=str(path))).weights_checksum == checksum
    assert [p.name for p in (tmp_path / "weights").iterdir()] == ["v000002"]


def test_weights_that_cannot_be_written_leave_nothing(tmp_path, config, make_weights):
    (tmp_path / "weights").mkdir()

    def full_disk():
        yield from list(make_weights(1).items())[:3]
        raise OSError(28, "No space left on device")

    with pytest.raises(JournalError, match=r"version 1 cannot be kept .*No space left.*raise keep_weights_every=1"):
        WeightArchive(tmp_path, config.model).save(1, full_disk())
    assert not list((tmp_path / "weights").iterdir())


def test_retention_is_checked(tmp_path, config):
    for options in ({"keep_weights_every": 0}, {"keep_last": 0}):
        with pytest.raises(ValueError, match=r"=0 must be at least 1"):
            WeightArchive(tmp_path, config.model, **options)
