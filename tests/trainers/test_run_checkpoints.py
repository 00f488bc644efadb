from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from trainers import GRPOConfig
from trainers.checkpoint import CheckpointError
from trainers.checkpoint_manifest import seal
from trainers.run_checkpoints import RunCheckpoints
from trainers.run_state import RunState
from trainers.untrained_groups import UntrainedGroup

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": [{"role": "user", "content": "hi"}], "answer": "ho"}]
ENGINE = {"kernel_fingerprint": "abc", "model_checksum": "12", "max_model_len": 512}


@pytest.fixture
def config(tmp_path: Path) -> GRPOConfig:
    return GRPOConfig(num_steps=20, checkpoint_dir=str(tmp_path / "checkpoints"), checkpoint_every=5)


class Part:
    """Stands where a trainer actor does."""

    def __init__(self, name: str, **facts: object) -> None:
        self.name, self.facts, self.loaded = name, facts, None

    def save(self, directory: str) -> dict[str, object]:
        (Path(directory) / f"{self.name}.txt").write_text(self.name)
        return self.facts

    def load(self, directory: str, facts: dict[str, object]) -> None:
        self.loaded = (Path(directory) / f"{self.name}.txt").read_text(), facts


def saved(config: GRPOConfig, *steps: int, **others: object) -> RunCheckpoints:
    checkpoints = RunCheckpoints(config, ROWS, {"reward": "exact_match"})
    checkpoints.require(ENGINE)
    for step in steps:
        policy = Part("policy", policy_version=step - 1, num_skipped_steps=1)
        checkpoints.save(step=step, prompt_position=4 * step, parts={"policy": policy.save}, **others)
    return checkpoints


def resumed(config: GRPOConfig, resume: str = "auto", **settings: object) -> RunCheckpoints:
    config = dataclasses.replace(config, resume=resume)
    checkpoints = RunCheckpoints(config, ROWS, {"reward": "exact_match"} | settings)
    checkpoints.require(ENGINE)
    return checkpoints


def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end(config):
    due = RunCheckpoints(dataclasses.replace(config, num_steps=12), ROWS).is_due
    assert [step for step in range(1, 13) if due(step)] == [5, 10, 12]
    never = RunCheckpoints(GRPOConfig(num_steps=12), ROWS).is_due
    assert not any(map(never, range(1, 13)))


def test_a_run_goes_on_where_the_checkpoint_says(config):
    assert resumed(config).start == RunState(step=0, prompt_position=0)
    assert resumed(config).start.policy_version == 0
    saved(config, 5, 10)
    checkpoints = resumed(config)
    assert checkpoints.resumed == Path(config.checkpoint_dir) / "step-000010"
    assert (checkpoints.start.step, checkpoints.start.prompt_position) == (10, 40)
    assert checkpoints.start.policy_version == 9
    policy = Part("policy")
    assert checkpoints.load({"policy": policy.load}) == []
    assert policy.loaded == ("policy", {"policy_version": 9, "num_skipped_steps": 1})
    assert resumed(config, str(checkpoints.folder.path(5))).start.step == 5


def test_groups_that_wait_are_kept(config, make_rollout):
    rollouts = (make_rollout([1], [2, 3], group_id="a"), make_rollout([1], [4], group_id="a", index=1))
    rollouts = tuple(
        dataclasses.replace(r, sampling_params=dataclasses.replace(r.sampling_params, n=2)) for r in rollouts
    )
    groups = [UntrainedGroup(position=3, group_id="a", rollouts=rollouts), UntrainedGroup(position=4, group_id="b")]
    saved(config, 5, groups=groups)
    assert resumed(config).load({"policy": Part("policy").load}) == groups


def test_parts_are_open_to_further_ones_and_must_all_be_wanted(config):
    checkpoints = saved(config)
    policy, critic = Part("policy", policy_version=3), Part("critic", depth=2)
    parts = {"policy": policy.save, "critic": critic.save}
    checkpoints.save(step=5, prompt_position=0, parts=parts)
    resumed(config).load({"policy": policy.load, "critic": critic.load})
    assert (policy.loaded, critic.loaded) == (("policy", {"policy_version": 3}), ("critic", {"depth": 2}))
    with pytest.raises(CheckpointError, match=r"has the parts \['critic', 'policy'\], and this run needs \['policy'\]"):
        resumed(config).load({"policy": policy.load})


def test_later_checkpoints_are_set_aside_once_the_run_goes_on(config):
    saved(config, 5, 10)
    checkpoints = resumed(config, str(Path(config.checkpoint_dir) / "step-000005"))
    assert checkpoints.folder.steps() == [5, 10]  # looking at one changes nothing
    checkpoints.load({"policy": Part("policy").load})
    assert checkpoints.folder.steps() == [5]
    new = saved(config)
    assert new.load({"policy": Part("policy").load}) == []
    assert new.folder.steps() == []  # a new run: nothing here is its own


def test_a_run_that_goes_on_from_anothers_checkpoint_owns_nothing_that_its_folder_holds(config, tmp_path):
    path = saved(config, 15).folder.path(15)
    other = dataclasses.replace(config, checkpoint_dir=str(tmp_path / "other"))
    saved(other, 5, 20)
    checkpoints = resumed(other, str(path))
    checkpoints.load({"policy": Part("policy").load})
    assert (checkpoints.start.step, checkpoints.folder.steps()) == (15, [])


def test_settings_that_change_bits_must_stay_and_all_that_differ_are_named(config):
    path = saved(config, 5).folder.path(5)
    with pytest.raises(
        ValueError,
        match=r"step-000005 was made with group_size=8 \(now 4\), betas=\[0.9, 0.99\] \(now \[0.8, 0.9\]\): a run goes "
        r"on .*begin a new run from the checkpoint's weights",
    ):
        resumed(dataclasses.replace(config, group_size=4, betas=(0.8, 0.9)), str(path))
    with pytest.raises(ValueError, match=r"num_trainer_ranks=1 \(now 2\), trainer_parallelism='ddp' \(now 'fsdp'\)"):
        resumed(dataclasses.replace(config, num_trainer_ranks=2, trainer_parallelism="fsdp"), str(path))
    with pytest.raises(ValueError, match=r"reward='exact_match' \(now 'numeric'\)"):
        resumed(config, reward="numeric")
    with pytest.raises(ValueError, match=r"kernel_fingerprint='abc' \(now 'xyz'\)"):
        resumed(config).require({"kernel_fingerprint": "xyz"})
    with pytest.raises(ValueError, match=r"num_rows=2 \(now 1\), rows_checksum='"):
        RunCheckpoints(dataclasses.replace(config, resume="auto"), ROWS[:1])


def test_settings_that_change_no_bit_may_be_others(config):
    saved(config, 5)
    others = {"num_engines": 3, "num_threads": 1, "eval_every": 1, "keep_checkpoints": 5, "num_steps": 40}
    others |= {"trainer_timeout": 5.0, "gradient_checkpointing": True}
    assert resumed(dataclasses.replace(config, **others)).start.step == 5


def test_a_schedule_that_falls_fixes_the_number_of_steps(config):
    config = dataclasses.replace(config, learning_rate_schedule="linear")
    saved(config, 5)
    with pytest.raises(ValueError, match=r"num_steps=20 \(now 40\)"):
        resumed(dataclasses.replace(config, num_steps=40))


def test_a_setting_that_older_code_did_not_know_had_its_default(config):
    path = saved(config, 5).folder.path(5)
    state = json.loads((path / "state.json").read_text())
    del state["settings"]["learning_rate_schedule"]
    start = RunState(**state)
    (path / "state.json").write_text(json.dumps(state))
    (path / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError):
        resumed(config)
    seal(path)
    assert resumed(config).start == start
    with pytest.raises(ValueError, match=r"learning_rate_schedule='constant' \(now 'cosine'\)"):
        resumed(dataclasses.replace(config, learning_rate_schedule="cosine"))


def test_rows_are_known_by_what_is_plain_data_in_them(config):
    for rows in ([{"prompt": "a", "judge": object()}], [{"prompt": "a", "keys": {(1, 2): 3}}]):
        directory = str(Path(config.checkpoint_dir).with_name(f"of-{len(repr(rows))}"))
        config = dataclasses.replace(config, checkpoint_dir=directory)
        first = RunCheckpoints(config, rows)
        first.save(step=5, prompt_position=0, parts={"policy": Part("policy", policy_version=0).save})
        again = [{name: object() if name == "judge" else value for name, value in row.items()} for row in rows]
        assert RunCheckpoints(dataclasses.replace(config, resume="auto"), again).start.step == 5


def test_a_trainer_that_writes_elsewhere_is_noticed(config):
    checkpoints = saved(config)
    with pytest.raises(CheckpointError, match="it runs on a machine without this disk"):
        checkpoints.save(step=5, prompt_position=0, parts={"policy": lambda directory: {"policy_version": 0}})
    assert checkpoints.folder.steps() == []


def test_a_state_that_is_none_is_refused(config):
    path = saved(config, 5).folder.path(5)
    for text in ("{}", '{"step": 1, "prompt_position": 0, "colour": 3}', "[", "[]"):
        (path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state.json is no state of a run"):
            RunState.read(path)
