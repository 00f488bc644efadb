from __future__ import annotations

import asyncio
import contextlib
import random
import re
import threading
import time

import pytest

from engine import SamplingParams
from engine.checkpoint import iter_weights
from engine.prompts import derive_seed
from engine.tokenizer import encode
from rollout import EpisodeRunner, Observation, RolloutPool

SEED = 7
PARAMS = SamplingParams(n=3, max_tokens=12)
ROWS = [{"prompt": f"the {word} fox", "answer": word} for word in ("quick", "lazy", "other", "brown")]
IDS = [f"p{i}" for i in range(len(ROWS))]
NEVER = threading.Event()


class Echo:
    """Answers three turns with a message that depends on the turn and on its seed, and rewards each."""

    num_turns = 3

    def reset(self, row, seed):
        self.random = random.Random(seed)
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, turn):
        is_done = turn.index + 1 == self.num_turns
        said = f"{len(turn.token_ids)} and {self.random.randrange(1000)}"
        return Observation([{"role": "user", "content": said}], reward=turn.index + 0.5, is_done=is_done)


class SlowEcho(Echo):
    """Takes its time, a different one at each call."""

    def reset(self, row, seed):
        time.sleep(random.SystemRandom().random() / 20)
        return super().reset(row, seed)

    def step(self, turn):
        time.sleep(random.SystemRandom().random() / 10)
        return super().step(turn)


class AsyncEcho:
    """Awaits what Echo does at once."""

    def __init__(self):
        self.echo = Echo()

    async def reset(self, row, seed):
        await asyncio.sleep(random.SystemRandom().random() / 20)
        return self.echo.reset(row, seed)

    async def step(self, turn):
        await asyncio.sleep(random.SystemRandom().random() / 20)
        return self.echo.step(turn)


@pytest.fixture(scope="module")
def pool(local_ray, config):
    with RolloutPool(config, num_engines=2, seed=SEED) as pool:
        yield pool


@pytest.fixture(scope="module")
def single(local_ray, config):
    with RolloutPool(config, num_engines=1, seed=SEED) as pool:
        yield pool


def wait_until_idle(pool):
    deadline = time.monotonic() + 10
    while any(stats.num_requests_running + stats.num_requests_waiting for stats in pool.stats().engines):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def integrity(request):
    yield
    if "pool" in request.fixturenames:
        pool = request.getfixturevalue("pool")
        pool.check_integrity()
        assert all(stats.num_free_blocks == stats.num_blocks for stats in pool.stats().engines)


@pytest.fixture(scope="module")
def groups(pool):
    return EpisodeRunner(pool, Echo, PARAMS).run(ROWS, IDS)


def test_an_episode_is_one_rollout_of_turns_and_masked_observations(pool, groups):
    assert [[(r.group_id, r.index) for r in group] for group in groups] == [[(i, k) for k in range(3)] for i in IDS]
    for row, group in zip(ROWS, groups, strict=True):
        for rollout in group:
            spans = rollout.metadata["turn_spans"]
            prompt = [{"role": "user", "content": row["prompt"]}]
            assert rollout.prompt_token_ids == encode(pool.tokenizer, prompt)
            assert rollout.metadata["row"] is row
            assert rollout.metadata["num_turns"] == len(spans) == 3
            assert rollout.metadata["turn_rewards"] == [0.5, 1.5, 2.5]
            assert rollout.metadata["reward"] == 4.5
            assert rollout.metadata["ended_by"] == "environment"
            is_drawn = [any(start <= i < end for start, end in spans) for i in range(len(rollout.token_ids))]
            assert rollout.loss_mask == [int(drawn) for drawn in is_drawn]
            assert all((logprob < 0) == drawn for logprob, drawn in zip(rollout.logprobs, is_drawn, strict=True))
            assert spans[-1][1] == len(rollout.token_ids)  # what no turn answers to is left out
            assert len(rollout.policy_versions) == len(rollout.token_ids)
    assert len({tuple(rollout.token_ids) for group in groups for rollout in group}) == 12


def test_every_turn_is_drawn_after_the_very_tokens_before_it(groups, single):
    """Each turn alone, as a prompt of token ids with the seed of its turn, gives the same tokens and bits."""
    rollout = groups[1][2]
    for turn, (start, end) in enumerate(rollout.metadata["turn_spans"]):
        prompt = rollout.prompt_token_ids + rollout.token_ids[:start]
        params = SamplingParams(max_tokens=12, seed=derive_seed(rollout.seed, str(turn)))
        [[alone]] = single.generate([prompt], params)
        assert alone.token_ids == rollout.token_ids[start:end]
        assert alone.logprobs == rollout.logprobs[start:end]


def test_neither_pace_nor_company_nor_engines_change_an_episode(pool, single, groups):
    expected = [[(r.token_ids, r.logprobs, r.seed) for r in group] for group in groups]
    for runner in (
        EpisodeRunner(pool, SlowEcho, PARAMS),
        EpisodeRunner(pool, AsyncEcho, PARAMS),
        EpisodeRunner(single, Echo, PARAMS, max_concurrency=2),
    ):
        found = runner.run(ROWS[::-1], IDS[::-1])[::-1]
        assert [[(r.token_ids, r.logprobs, r.seed) for r in group] for group in found] == expected
    assert EpisodeRunner(pool, Echo, PARAMS).run(ROWS[2:3], IDS[2:3]) == [groups[2]]


def test_ids_that_nobody_gave_count_up_and_other_seeds_draw_others(pool):
    runner = EpisodeRunner(pool, Echo, SamplingParams(max_tokens=6))
    [[first], [second]], [[third]] = runner.run(ROWS[:2]), runner.run(ROWS[:1])
    assert [first.group_id, second.group_id, third.group_id] == ["e0", "e1", "e2"]
    assert first.token_ids != third.token_ids
    [[seeded]] = EpisodeRunner(pool, Echo, SamplingParams(max_tokens=6, seed=5)).run(ROWS[:1])
    assert seeded.group_id == "e0"
    assert seeded.token_ids != first.token_ids


def test_a_slow_environment_holds_up_its_own_sample_only(pool):
    finished: dict[str, float] = {}

    class OneSlow(Echo):
        def reset(self, row, seed):
            self.answer = row["answer"]
            if self.answer == "quick":
                time.sleep(1.5)
            return super().reset(row, seed)

        def close(self):
            finished[self.answer] = time.monotonic()

    EpisodeRunner(pool, OneSlow, SamplingParams(max_tokens=4)).run(ROWS)
    last, *others = sorted(finished, key=finished.get, reverse=True)
    assert last == "quick"
    assert finished["quick"] - max(finished[other] for other in others) > 0.5


def test_a_growing_conversation_finds_its_own_blocks(single):
    before = single.stats().engines[0]
    seen = []

    class Watched(Echo):
        def step(self, turn):
            stats = single.stats().engines[0]
            seen.append((stats.prefix_cache_queries, stats.prefix_cache_hits))
            return super().step(turn)

    prompt = {"prompt": "nothing to see here, and then the other one answers that there is nothing to see " * 2}
    [[rollout]] = EpisodeRunner(single, Watched, SamplingParams(max_tokens=20, ignore_eos=True)).run([prompt])
    looked_up = before.prefix_cache_queries, before.prefix_cache_hits
    block_size = single.config.block_size
    for turn, (start, _) in enumerate(rollout.metadata["turn_spans"]):
        queries, hits = (now - then for now, then in zip(seen[turn], looked_up, strict=True))
        looked_up = seen[turn]
        assert queries >= len(rollout.prompt_token_ids) + start - 1
        if turn:  # all full blocks whose keys and values the turns before have computed
            previous_end = len(rollout.prompt_token_ids) + rollout.metadata["turn_spans"][turn - 1][1]
            assert hits == (previous_end - 1) // block_size * block_size


# --- what can go wrong ---


class Fails(Echo):
    """Breaks in one way or another, as the row says, in every sample of odd index it plays."""

    def reset(self, row, seed):
        self.fault = row["fault"]
        if self.fault == "reset raises":
            raise KeyError("no such task")
        if self.fault == "no prompt":
            return []
        return super().reset(row, seed)

    def step(self, turn):
        if turn.index == 1:
            if self.fault == "step raises":
                raise ZeroDivisionError("division by zero")
            if self.fault == "step hangs":
                NEVER.wait()
            if self.fault == "step gives text":
                return "= 36"
            if self.fault == "unknown id":
                return Observation([5, 320])
            if self.fault == "no content":
                return Observation(reward=1.0)
            if self.fault == "exits":
                raise SystemExit(3)
        return super().step(turn)


FAULTS = {
    "reset raises": r"reset raised KeyError\('no such task'\)",
    "no prompt": "reset gave no prompt: .* is empty",
    "step raises": r"step of turn 1 raised ZeroDivisionError\('division by zero'\)",
    "step hangs": "step of turn 1 took longer than 1.0 s",
    "step gives text": "step of turn 1 returned '= 36', which is no Observation",
    "unknown id": "token id 320 in an observation is outside the vocabulary",
    "no content": "an Observation without content must end the episode",
    "exits": "it called for an exit of the process",
}


def test_an_environment_that_fails_masks_its_sample_and_no_other(pool, groups, caplog):
    rows = [{**ROWS[0], "fault": None}, *({**ROWS[1], "fault": fault} for fault in FAULTS)]
    runner = EpisodeRunner(pool, Fails, PARAMS, environment_timeout=1.0)
    start = time.monotonic()
    healthy, *failed = runner.run(rows, ["p0", *FAULTS])
    assert time.monotonic() - start < 30
    assert [(r.token_ids, r.loss_mask) for r in healthy] == [(r.token_ids, r.loss_mask) for r in groups[0]]
    for message, group in zip(FAULTS.values(), failed, strict=True):
        for rollout in group:
            assert re.search(message, rollout.metadata["failure"])
            assert (rollout.finish_reason, rollout.metadata["ended_by"]) == ("abort", "failure")
            assert rollout.metadata["reward"] is None
            assert rollout.loss_mask == [0] * len(rollout.token_ids)
            assert rollout.metadata["num_turns"] == (0 if message.startswith("reset") else 2)
    assert f"{3 * len(FAULTS)} of {3 * len(rows)} episodes failed and are masked" in caplog.text


class Stubborn(AsyncEcho):
    """A coroutine that will not be cancelled, or never gives the event loop back."""

    async def step(self, turn):
        if turn.index == 1:
            while not NEVER.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
        return await super().step(turn)


class Blocking(AsyncEcho):
    async def step(self, turn):
        if turn.index == 1:
            NEVER.wait()
        return await super().step(turn)


@pytest.mark.parametrize("environment", [Stubborn, Blocking])
def test_a_coroutine_that_never_ends_does_not_hang_the_call(pool, environment):
    start = time.monotonic()
    [[rollout]] = EpisodeRunner(pool, environment, SamplingParams(max_tokens=4), environment_timeout=0.5).run(ROWS[:1])
    assert time.monotonic() - start < 10
    assert rollout.metadata["failure"] == "step of turn 1 took longer than 0.5 s"


def test_environments_are_closed_whatever_became_of_them(pool):
    closed = []

    class Closes(Fails):
        def close(self):
            closed.append(self.fault)
            raise OSError("already gone")

    rows = [{**ROWS[0], "fault": fault} for fault in (None, "step raises", "step hangs")]
    EpisodeRunner(pool, Closes, SamplingParams(max_tokens=4), environment_timeout=0.5).run(rows)
    assert set(closed) == {None, "step raises", "step hangs"}


class Talks(Echo):
    """Never ends by itself, and says in its reward which turn was called the last."""

    def step(self, turn):
        return Observation([7] * 10, reward=float(turn.is_last))


def test_an_episode_ends_after_max_turns(pool):
    [group] = EpisodeRunner(pool, Talks, PARAMS, max_turns=2).run(ROWS[:1])
    for rollout in group:
        assert (rollout.metadata["num_turns"], rollout.metadata["ended_by"]) == (2, "max_turns")
        assert rollout.metadata["turn_rewards"] == [0.0, 1.0]
        assert rollout.loss_mask[-1] == 1


def test_an_episode_never_outgrows_max_total_tokens(pool):
    num_prompt = len(encode(pool.tokenizer, [{"role": "user", "content": ROWS[0]["prompt"]}]))
    params = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
    for max_total, num_turns, length in ((num_prompt + 22, 1, 12), (num_prompt + 23, 2, 23), (num_prompt + 12, 1, 12)):
        [group] = EpisodeRunner(pool, Talks, params, max_total_tokens=max_total).run(ROWS[:1])
        for rollout in group:
            assert (rollout.metadata["num_turns"], len(rollout.token_ids)) == (num_turns, length)
            assert rollout.metadata["ended_by"] == "max_total_tokens"
            assert rollout.finish_reason == "length"
            assert sum(rollout.loss_mask) == min(length, 12) + (num_turns - 1)


def test_a_prompt_without_room_fails_its_sample(pool):
    [[rollout]] = EpisodeRunner(pool, Echo, SamplingParams(), max_total_tokens=5).run(ROWS[:1])
    assert re.search(r"reset gave a prompt of \d+ tokens.*max_total_tokens=5", rollout.metadata["failure"])


def test_an_aborted_turn_ends_its_episode_without_a_reward(pool):
    class Aborts(Echo):
        def reset(self, row, seed):
            threading.Thread(target=_abort_when_running, args=(pool, "long/0/0")).start()
            return super().reset(row, seed)

    params = SamplingParams(max_tokens=400, ignore_eos=True)
    [[rollout]] = EpisodeRunner(pool, Aborts, params).run(ROWS[:1], ["long"])
    assert (rollout.finish_reason, rollout.metadata["ended_by"]) == ("abort", "abort")
    assert rollout.metadata["reward"] is None
    assert rollout.loss_mask == [0] * len(rollout.token_ids)


def _abort_when_running(pool, group_id):
    is_running = False
    while not is_running:
        with contextlib.suppress(ValueError):  # not yet
            pool.abort([group_id])
            is_running = True


def test_a_template_that_cannot_be_cut_ends_the_call_and_text_is_the_way_out(single, monkeypatch):
    template = single.tokenizer.chat_template.replace("assistant\n", "assistant\nthink: ")
    monkeypatch.setattr(single.tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=r"(?s)observations cannot be chat messages.*text or token ids"):
        EpisodeRunner(single, Echo, PARAMS).run(ROWS, IDS)
    wait_until_idle(single)
    [group] = EpisodeRunner(single, Talks, PARAMS, max_turns=2).run(ROWS[:1])
    assert {rollout.metadata["num_turns"] for rollout in group} == {2}


def test_a_call_that_runs_out_of_time_leaves_nothing_running(pool):
    params = SamplingParams(max_tokens=450, ignore_eos=True)
    with pytest.raises(TimeoutError, match=r"4 of 4 episodes are unfinished after 0\.05 s and are aborted"):
        EpisodeRunner(pool, Echo, params).run(ROWS, timeout=0.05)
    wait_until_idle(pool)


def test_the_time_of_a_call_counts_for_environments_too(pool):
    row, start = {**ROWS[0], "fault": "step hangs"}, time.monotonic()
    with pytest.raises(TimeoutError, match="1 of 1 episodes"):
        EpisodeRunner(pool, Fails, SamplingParams(max_tokens=4), environment_timeout=None).run([row], timeout=1.0)
    assert time.monotonic() - start < 5


def test_it_runs_inside_an_event_loop(pool, groups):
    async def play():
        with pytest.raises(RuntimeError, match=r"await runner\.run_async"):
            EpisodeRunner(pool, Echo, PARAMS).run(ROWS)
        return await EpisodeRunner(pool, Echo, PARAMS).run_async(ROWS, IDS)

    assert asyncio.run(play()) == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_turns": 0}, "max_turns=0 must be above 0"),
        ({"max_concurrency": 0}, "max_concurrency=0 must be above 0"),
        ({"environment_timeout": -1.0}, "environment_timeout=-1.0 must be above 0"),
        ({"max_total_tokens": 513}, "max_total_tokens=513 must be from 2 to the engines' max_model_len=512"),
    ],
)
def test_options_out_of_range_are_named(pool, options, message):
    with pytest.raises(ValueError, match=message):
        EpisodeRunner(pool, Echo, PARAMS, **options)


def test_mistakes_of_the_call_are_named(pool):
    runner = EpisodeRunner(pool, Echo, PARAMS)
    with pytest.raises(ValueError, match="rows is empty"):
        runner.run([])
    with pytest.raises(ValueError, match="group_ids has 1 entries for 4 prompts"):
        runner.run(ROWS, ["a"])
    with pytest.raises(ValueError, match="must be text, token ids, or a list of chat messages"):
        Observation(3)
    with pytest.raises(ValueError, match="must have 'role' and 'content'"):
        Observation([{"role": "user"}])
    with pytest.raises(ValueError, match="reward=nan of an Observation must be a finite number"):
        Observation("= 36", reward=float("nan"))


def test_weights_that_change_between_turns_stamp_each_turn(
    local_ray, config, model_dir, make_weights, forward_logprobs
):
    """Each drawn token has exactly the log-probability that a forward under its own version gives it."""
    with RolloutPool(config, num_engines=2, seed=SEED) as pool:

        class Syncs(Echo):
            def step(self, turn):
                if self.syncs:
                    pool.sync_weights(make_weights(turn.index + 1), turn.index + 1)
                return super().step(turn)

            def reset(self, row, seed):
                self.syncs = row["answer"] == "quick"
                return super().reset(row, seed)

        [rollout], *others = EpisodeRunner(pool, Syncs, SamplingParams(max_tokens=8)).run(ROWS)
        pool.check_integrity()
    weights = {0: dict(iter_weights(model_dir)), **{version: make_weights(version) for version in (1, 2, 3)}}
    versions = [rollout.policy_versions[start] for start, _ in rollout.metadata["turn_spans"]]
    assert versions == [0, 1, 2]
    for played in [rollout, *(other for [other] in others)]:
        assert played.is_exact
        by_version = {v: forward_logprobs(weights[v], played) for v in set(played.policy_versions)}
        for i, (version, mask) in enumerate(zip(played.policy_versions, played.loss_mask, strict=True)):
            assert not mask or played.logprobs[i] == by_version[version][i]
