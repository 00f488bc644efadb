from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from reward_functions import hangs_over_hard_prompts, has_letter_e

from rollout import EngineConfig
from trainers import GRPOConfig, GRPOTrainer, Policy

ROWS = [{"prompt": f"what is {a} + {b}? ", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 4)]
EVAL_ROWS = [{"prompt": "what is 7 + 8? ", "answer": "15"}, {"prompt": "it is ", "right_completions": ["the ", "so"]}]
CONFIG = GRPOConfig(
    num_steps=3,
    num_prompts=4,
    group_size=4,
    max_tokens=8,
    learning_rate=1e-3,
    micro_batch_tokens=128,
    eval_every=2,
    num_threads=1,
    seed=1,
)


@pytest.fixture(scope="module")
def engine_config(tiny_model_dir) -> EngineConfig:
    return EngineConfig(model=str(tiny_model_dir("llama")), num_threads=2)


@pytest.fixture(scope="module")
def run(local_ray, engine_config, tmp_path_factory):
    """A run of three steps, with everything that its callbacks saw."""
    seen, phases = [], []
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path_factory.mktemp("run")))
    trainer = GRPOTrainer(config, engine_config, ROWS, has_letter_e, EVAL_ROWS, [seen.append], phases.append)
    history = trainer.train()
    return SimpleNamespace(trainer=trainer, history=history, seen=seen, phases=phases)


def test_the_mismatch_is_exactly_zero_on_every_step(run):
    steps = run.history[1:]
    assert [metrics["step"] for metrics in steps] == [1, 2, 3]
    assert all(metrics["mismatch/num_tokens"] > 0 for metrics in steps)
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in steps] == [0.0, 0.0, 0.0]
    assert [metrics["mismatch/kl"] for metrics in steps] == [0.0, 0.0, 0.0]
    assert [metrics["actor/ppo_kl"] for metrics in steps] == [0.0, 0.0, 0.0]


def test_every_step_moves_and_syncs_the_weights(run):
    assert [metrics["policy_version"] for metrics in run.history[1:]] == [1, 2, 3]
    assert all(metrics["weight_sync/bytes"] > 0 for metrics in run.history[1:])
    versions = {version for group in run.trainer.batch.groups for r in group for version in r.policy_versions}
    assert versions == {2}  # the last batch was drawn under the weights of two updates


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gspo", "reinforce_pp"])
def test_other_algorithms_train_in_lockstep(local_ray, engine_config, name):
    settings = {field: getattr(CONFIG, field) for field in ("num_prompts", "group_size", "max_tokens", "learning_rate")}
    config = GRPOConfig.for_algorithm(name, num_steps=2, num_threads=1, **settings)
    history = GRPOTrainer(config, engine_config, ROWS, has_letter_e).train()
    assert [metrics["policy_version"] for metrics in history[1:]] == [1, 2]
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in history[1:]] == [0.0, 0.0]
    assert [metrics["actor/ppo_kl"] for metrics in history[1:]] == [0.0, 0.0]
    if name == "reinforce_pp":  # which learns from groups whose rewards are all equal, too
        drawn = config.num_prompts * config.group_size
        assert all(metrics["actor/num_tokens"] >= drawn for metrics in history[1:])
        assert history[1]["actor/reward_kl_penalty"] == 0.0


def test_dashboard_names_are_those_that_people_know(run):
    names = {
        "reward/mean", "reward/std", "reward/num_failed", "reward/num_timed_out", "frac_reward_zero_std",
        "rewards/has_letter_e/mean",
        "mismatch/kl", "mismatch/logprob_abs_diff_mean", "mismatch/logprob_abs_diff_max",
        "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy", "actor/grad_norm", "actor/lr",
        "response_length/mean", "response_length/max", "response_length/min", "response_length/clip_ratio",
        "response/aborted_ratio",
        "timing_s/rollout", "timing_s/reward", "timing_s/train", "timing_s/weight_sync", "timing_s/step",
        "perf/rollout_tokens_per_second", "perf/train_tokens_per_second",
        "perf/engine_num_threads", "perf/trainer_num_threads",
    }  # fmt: skip
    for metrics in run.history[1:]:
        assert names <= set(metrics)
        assert all(isinstance(value, int | float) for value in metrics.values())


def test_expected_reward_is_measured_at_start_end_and_between(run, engine_config):
    assert ["eval/expected_reward" in metrics for metrics in run.history] == [True, False, True, True]
    policy = Policy(engine_config.model, num_threads=1)
    expected = policy.expected_reward([row["prompt"] for row in EVAL_ROWS], [" 15\n", ["the ", "so"]])
    assert run.history[0] == {
        "step": 0,
        "eval/expected_reward": expected,
        "timing_s/eval": run.history[0]["timing_s/eval"],
    }


def test_callbacks_see_every_step_as_it_ends(run):
    assert run.seen == run.history
    step = ["rollout", "reward", "train", "weight_sync"]
    assert run.phases == ["eval", *step, *step, "eval", *step, "eval"]


def test_the_final_weights_are_those_of_the_last_version(run, engine_config):
    saved = Policy(str(Path(run.trainer.config.output_dir) / "weights"), num_threads=1)
    expected = saved.expected_reward([row["prompt"] for row in EVAL_ROWS], [" 15\n", ["the ", "so"]])
    assert expected == run.history[-1]["eval/expected_reward"]
    assert expected != run.history[0]["eval/expected_reward"]


def test_other_engines_and_a_checkpoint_between_give_the_same_run(run, engine_config, tmp_path):
    """Two steps on two engines of one thread, and the third, from the checkpoint, on one engine of two."""
    saving = dataclasses.replace(CONFIG, num_steps=2, num_engines=2, checkpoint_dir=str(tmp_path), checkpoint_every=1)
    phases = []
    one_thread = dataclasses.replace(engine_config, num_threads=1)
    first = GRPOTrainer(saving, one_thread, ROWS, has_letter_e, EVAL_ROWS, on_phase=phases.append)
    assert bits_of(first.train()) == bits_of(run.history[:3])
    assert phases.count("checkpoint") == 2

    longer = dataclasses.replace(saving, num_steps=3, num_engines=1, resume="auto")
    second = GRPOTrainer(longer, engine_config, ROWS, has_letter_e, EVAL_ROWS)
    assert second.checkpoints.start.step == 2
    assert bits_of(second.train()) == bits_of(run.history[3:])
    token_ids = [[r.token_ids for r in group] for group in run.trainer.batch.groups]
    assert token_ids == [[r.token_ids for r in group] for group in second.batch.groups]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    with pytest.raises(ValueError, match=r"step-000003 was made with .*seed=1 \(now 2\)"):
        GRPOTrainer(dataclasses.replace(longer, seed=2), engine_config, ROWS, has_letter_e, EVAL_ROWS)


def bits_of(history):
    """Without what depends on time."""
    timing = ("timing_s/", "perf/", "weight_sync/pause")
    return [{name: value for name, value in metrics.items() if not name.startswith(timing)} for metrics in history]


def test_threads_and_fingerprint_are_recorded(run):
    assert run.trainer.environment["engine"]["num_threads"] == 2
    assert run.trainer.environment["trainer"]["num_threads"] == 1
    assert run.history[-1]["perf/engine_num_threads"] == 2
    assert run.history[-1]["perf/trainer_num_threads"] == 1
    fingerprints = {rollout.kernel_fingerprint for group in run.trainer.batch.groups for rollout in group}
    assert fingerprints == {run.trainer.environment["trainer"]["kernel_fingerprint"]}


def test_a_failing_reward_function_is_masked_and_counted_and_the_run_goes_on(local_ray, engine_config):
    seen = set()

    def fails_on_the_second_batch(prompts, completions):
        seen.update(prompts)  # each batch has four new ones
        if 4 < len(seen) <= 8:
            raise RuntimeError("no judge today")
        return has_letter_e(completions)

    config = dataclasses.replace(CONFIG, reward_processes=0)
    history = GRPOTrainer(config, engine_config, ROWS, fails_on_the_second_batch).train()
    assert [metrics["reward/num_failed"] for metrics in history[1:]] == [0, 16, 0]
    assert [metrics["policy_version"] for metrics in history[1:]] == [1, 1, 2]
    assert [metrics["actor/num_skipped_steps"] for metrics in history[1:]] == [0, 1, 1]
    assert "reward/mean" not in history[2]
    assert history[2]["mismatch/num_tokens"] > 0  # compared all the same
    assert history[3]["mismatch/logprob_abs_diff_max"] == 0.0


@pytest.mark.slow
def test_a_reward_that_hangs_is_masked_and_counted_and_the_run_goes_on(local_ray, engine_config):
    rows = [{**row, "level": "hard" if i == 0 else "easy"} for i, row in enumerate(ROWS[:4])]
    config = dataclasses.replace(CONFIG, num_steps=2, group_size=3, reward_timeout=1.0, reward_processes=2)
    history = GRPOTrainer(config, engine_config, rows, hangs_over_hard_prompts).train()
    assert [metrics["reward/num_timed_out"] for metrics in history[1:]] == [3, 3]  # each batch has all four prompts
    assert [metrics["reward/num_masked"] for metrics in history[1:]] == [3, 3]
    assert [metrics["reward/num_failed"] for metrics in history[1:]] == [0, 0]
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in history[1:]] == [0.0, 0.0]


@pytest.mark.slow
def test_shuffled_rewards_are_dealt_out_anew_and_groups_without_spread_are_only_compared(local_ray, engine_config):
    calls = []

    def first_is_right(completions):
        calls.append(completions)
        return [float(len(calls) == 1)] + [0.0] * (len(completions) - 1)

    config = dataclasses.replace(CONFIG, num_steps=1, shuffle_rewards=True, check_all_groups=True, reward_processes=0)
    trainer = GRPOTrainer(config, engine_config, ROWS, first_is_right)
    metrics = trainer.train()[1]
    assert trainer.batch.rewards.total.flatten().tolist() == [1.0] + [0.0] * 15  # reported as they were given
    assert trainer.batch.advantages.flatten().argmax() != 0
    (trained,) = [group for group, a in zip(trainer.batch.groups, trainer.batch.advantages) if a.any()]
    assert metrics["actor/num_tokens"] == sum(len(r.token_ids) for r in trained)
    assert metrics["mismatch/num_tokens"] == sum(len(r.token_ids) for group in trainer.batch.groups for r in group)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0


@pytest.mark.slow
def test_an_engine_that_cannot_start_is_the_error_that_ends_a_run_with_a_ray_of_its_own(engine_config, tmp_path):
    """The trainer, which starts beside the engines, is ended before the Ray that both are in."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        from rollout import EngineConfig
        from trainers import GRPOConfig, GRPOTrainer

        engine_config = EngineConfig(model={engine_config.model!r}, num_threads=1, kv_cache_memory_bytes=1)
        config = GRPOConfig(num_steps=1, num_prompts=2, group_size=2, max_tokens=4, num_threads=1)
        try:
            GRPOTrainer(config, engine_config, [{{"prompt": "it is "}}], lambda completions: None).train()
        except ValueError as error:
            import ray
            print(ray.is_initialized(), error)
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False kv_cache_memory_bytes=1 holds no block")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_nothing_left_running(engine_config, tmp_path, signum):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os
        from rollout import EngineConfig
        from trainers import GRPOConfig, GRPOTrainer

        def reward(completions):
            return [float("e" in text) for text in completions]

        def show(metrics):
            print("step", metrics["step"], flush=True)

        config = GRPOConfig(num_steps=100000, num_prompts=2, group_size=2, max_tokens=4, num_threads=1)
        engine_config = EngineConfig(model={engine_config.model!r}, num_threads=1)
        rows = [{{"prompt": "it is ", "answer": ""}}]
        try:
            GRPOTrainer(config, engine_config, rows, reward, callbacks=[show]).train()
        except KeyboardInterrupt:
            import ray
            print("interrupted", ray.is_initialized(), flush=True)
        """)
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": os.getcwd(), "LOCKSTEP_TEST_RUN": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 2"):
            break
    # Ctrl-C reaches every process in the terminal's foreground group, a SIGTERM only the one it is sent to.
    (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
    output, _ = process.communicate(timeout=120)
    assert "interrupted False" in output
    assert process.returncode == 0
    assert processes_with_environment(f"LOCKSTEP_TEST_RUN={tmp_path}") == []


def processes_with_environment(entry: str) -> list[str]:
    """Command lines of the live processes that inherited an environment variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
    return found


@pytest.mark.parametrize(
    "field",
    [
        {"num_prompts": 0}, {"group_size": 0}, {"max_tokens": 0}, {"num_iterations": 0}, {"num_engines": 0},
        {"micro_batch_tokens": 0}, {"num_steps": -1}, {"warmup_steps": -1}, {"eval_every": -1}, {"kl_coef": -0.1},
        {"learning_rate": 0.0}, {"max_grad_norm": 0.0}, {"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": 0.0},
        {"temperature": 0.0}, {"num_threads": 0}, {"reward_timeout": 0.0}, {"reward_processes": -1},
        {"checkpoint_every": -1}, {"checkpoint_every": 2}, {"keep_checkpoints": 0},
        {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.5},
    ],
)  # fmt: skip
def test_wrong_settings_are_named(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        GRPOConfig(**field)


def test_samples_of_a_part_of_the_distribution_are_drawn_at_temperature_one():
    assert GRPOConfig(top_k=20, min_p=0.1).is_truncated
    with pytest.raises(ValueError, match=r"temperature=0\.7 must be 1 with top_p"):
        GRPOConfig(temperature=0.7, top_p=0.9)


@pytest.mark.slow
def test_prompts_of_mixed_kinds_and_groups_of_one_train_in_lockstep(local_ray, engine_config):
    """Batches that the data set's rows do not divide into, of text, ids and messages; a sample is its own baseline."""
    rows = [{"prompt": "what is "}, {"prompt": [9, 8, 7]}, {"prompt": [{"role": "user", "content": "the sum?"}]}]
    config = dataclasses.replace(CONFIG, num_prompts=2, group_size=1, num_steps=2)
    history = GRPOTrainer(config, engine_config, rows, has_letter_e_or_message).train()
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in history[1:]] == [0.0, 0.0]
    assert [metrics["policy_version"] for metrics in history[1:]] == [1, 2]
    assert all(metrics["frac_reward_zero_std"] == 0.0 and "reward/std" not in metrics for metrics in history[1:])


def has_letter_e_or_message(completions):
    return [float(isinstance(one, list) or "e" in one) for one in completions]


def test_data_without_the_needed_columns_is_refused(engine_config):
    with pytest.raises(ValueError, match="no rows"):
        GRPOTrainer(CONFIG, engine_config, [], has_letter_e)
    with pytest.raises(ValueError, match=r"row 0 .*'question'.* no `prompt`"):
        GRPOTrainer(CONFIG, engine_config, [{"question": "1 + 1"}], has_letter_e)
    for prompt in (None, 5, "", []):
        with pytest.raises(ValueError, match=r"row 1 of the data set has the prompt .*: it must be text"):
            GRPOTrainer(CONFIG, engine_config, [*ROWS[:1], {"prompt": prompt}], has_letter_e)
    with pytest.raises(ValueError, match=r"reward function hangs_over_hard_prompts takes \['level'\]"):
        GRPOTrainer(CONFIG, engine_config, ROWS, hangs_over_hard_prompts)
    with pytest.raises(ValueError, match="`answer` or `right_completions`"):
        GRPOTrainer(CONFIG, engine_config, ROWS, has_letter_e, eval_rows=[{"prompt": "1 + 1"}])
