from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from dataclasses import replace

import pytest
import ray

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.checkpoint import iter_weights
from engine.prompts import derive_seed
from engine.tokenizer import encode
from rollout import EngineError, PoolHandle, RolloutPool
from rollout.journal import read_journal
from rollout.submission import Submission

SEED = 7
PARAMS = SamplingParams(n=3, max_tokens=16)
LONG = SamplingParams(n=4, max_tokens=400, ignore_eos=True)
PROMPTS = ["the quick brown fox", [9, 8, 7], [{"role": "user", "content": "what is the sum?"}], "it is here: "] * 4
IDS = [f"p{i}" for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def pool(local_ray, config, tmp_path_factory):
    traced = replace(config, trace_path=str(tmp_path_factory.mktemp("traces") / "{pid}.json"))
    with RolloutPool(traced, num_engines=2, seed=SEED) as pool:
        yield pool


@pytest.fixture(scope="module")
def single(local_ray, config):
    with RolloutPool(config, num_engines=1, seed=SEED) as pool:
        yield pool


@pytest.fixture(autouse=True)
def integrity(request):
    yield
    if "pool" in request.fixturenames:
        pool = request.getfixturevalue("pool")
        pool.check_integrity()
        assert all(stats.num_free_blocks == stats.num_blocks for stats in pool.stats().engines)


@pytest.fixture(scope="module")
def rollouts(pool):
    return pool.generate(PROMPTS, PARAMS, group_ids=IDS)


def test_rollouts_equal_a_local_engines_bit_for_bit(pool, rollouts, config):
    engine = LLMEngine(config)
    assert len(rollouts) == len(PROMPTS)
    for i, group in enumerate(rollouts):
        seed = derive_seed(SEED, IDS[i])
        (completions,) = engine.generate([PROMPTS[i]], SamplingParams(n=3, max_tokens=16, seed=seed))
        assert [(r.index, r.token_ids, r.logprobs, r.text, r.finish_reason) for r in group] == [
            (c.index, c.token_ids, c.logprobs, c.text, c.finish_reason) for c in completions
        ]
        assert {r.seed for r in group} == {seed}
        assert {r.kernel_fingerprint for r in group} == {engine.kernel_fingerprint}


def test_every_engine_writes_a_trace_of_its_own(pool, rollouts):
    paths = pool.write_trace()
    assert {path.name for path in paths} == {f"{info.pid}.json" for info in pool.engine_infos}
    for path in paths:
        names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
        assert names.count("execute") >= PARAMS.max_tokens


def test_a_rollout_carries_what_was_kept_and_the_likeliest_tokens(pool, config):
    params = SamplingParams(n=2, max_tokens=8, top_p=0.6, repetition_penalty=1.2, logprobs=3, seed=5)
    (group,) = pool.generate(PROMPTS[:1], params)
    (completions,) = LLMEngine(config).generate(PROMPTS[:1], params)
    for rollout, completion in zip(group, completions, strict=True):
        for name in ("token_ids", "logprobs", "raw_logprobs", "kept_mass", "top_logprobs"):
            assert getattr(rollout, name) == getattr(completion, name)
            assert len(getattr(rollout, name)) == len(rollout.token_ids)
        assert min(rollout.kept_mass) < 1
    plain = pool.generate(PROMPTS[:1], PARAMS)[0][0]
    assert (plain.raw_logprobs, plain.kept_mass, plain.top_logprobs) == (None, None, None)


def test_a_rollout_carries_the_log_probabilities_of_its_prompt(pool, config):
    params = SamplingParams(n=2, max_tokens=3, prompt_logprobs=1)
    [group] = pool.generate([[7, 11, 13, 17]], params)
    engine = LLMEngine(config)
    [completions] = engine.generate([[7, 11, 13, 17]], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert [rollout.prompt_logprobs for rollout in group] == [completions[0].prompt_logprobs] * 2
    first, *others = group[0].prompt_logprobs
    assert first is None
    assert [set(entry) >= {token_id} for entry, token_id in zip(others, [11, 13, 17], strict=True)] == [True] * 3


def test_one_engine_gives_the_rollouts_of_two(rollouts, single):
    assert single.generate(PROMPTS, PARAMS, group_ids=IDS) == rollouts


def test_neither_order_nor_company_changes_a_rollout(pool, rollouts):
    reverse = pool.generate(PROMPTS[::-1], PARAMS, group_ids=IDS[::-1])
    assert reverse[::-1] == rollouts
    assert pool.generate([PROMPTS[5]], PARAMS, group_ids=[IDS[5]]) == [rollouts[5]]


def test_work_is_shared_and_a_prompts_samples_stay_together(pool):
    before = [stats.prefix_cache_queries for stats in pool.stats().engines]
    prompts = [[20 + i] * 18 for i in range(6)]
    pool.generate(prompts, SamplingParams(n=5, max_tokens=2))
    queries = [stats.prefix_cache_queries - b for stats, b in zip(pool.stats().engines, before)]
    # a prompt is looked up once for all of its samples, and each engine gets half of the prompts
    assert queries == [3 * 18, 3 * 18]


def test_a_rollout_says_all_that_a_trainer_needs(pool):
    params = SamplingParams(n=2, max_tokens=5, temperature=0.7, seed=3)
    groups = pool.generate(["one", "two"], params, metadata=[{"answer": 1}, {"answer": 2}])
    assert [len(group) for group in groups] == [2, 2]
    for position, group in enumerate(groups):
        for index, rollout in enumerate(group):
            assert rollout.index == index
            assert rollout.metadata == {"answer": position + 1}
            assert rollout.prompt_token_ids == encode(pool.tokenizer, ["one", "two"][position])
            assert rollout.sampling_params == params
            assert rollout.seed == 3
            lengths = {len(rollout.logprobs), len(rollout.policy_versions), len(rollout.loss_mask)}
            assert lengths == {len(rollout.token_ids)}
            assert rollout.is_exact
    assert len({group[0].group_id for group in groups}) == 2
    assert groups[0][0].token_ids != groups[0][1].token_ids


def test_a_stream_gives_short_groups_before_long_ones(pool):
    lengths = [200, 4, 4, 4]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    ids = [f"s{i}" for i in range(4)]
    arrivals = [group[0].group_id for group in pool.stream([[5], [6], [7], [8]], params, group_ids=ids)]
    assert sorted(arrivals) == ids
    assert arrivals[-1] == "s0"


def test_async_for_works_too(pool):
    async def arrivals():
        return [group async for group in pool.stream(PROMPTS, PARAMS, group_ids=IDS)]

    groups = asyncio.run(arrivals())
    assert sorted(group[0].group_id for group in groups) == sorted(IDS)


def test_an_iterator_of_prompts_is_read_no_further_than_engines_have_room_for(local_ray, config):
    num_read = 0

    def prompts():
        nonlocal num_read
        for i in range(300):
            num_read += 1
            yield [5 + i % 200, 7]

    with RolloutPool(replace(config, max_num_seqs=4), num_engines=1, seed=SEED) as pool:
        stream = pool.stream(prompts(), SamplingParams(n=2, max_tokens=3, ignore_eos=True))
        assert num_read <= 9  # 16 samples of queue, and one that did not fit
        first = next(stream)
        arrived = [first, *stream]
        assert num_read == 300
        ids = [group[0].group_id for group in arrived]
        assert sorted(ids, key=lambda name: int(name.split("/")[1])) == [f"g0/{i}" for i in range(300)]
        with pytest.raises(ValueError, match="an iterator of prompts takes one params"):
            pool.stream(iter([[5]]), PARAMS, group_ids=["a"])
        assert pool.stats().num_groups_running == 0


def test_leaving_a_stream_aborts_the_rest(pool):
    before = sum(stats.num_generated_tokens for stats in pool.stats().engines)
    for group in pool.stream([[5]] * 8, [SamplingParams(max_tokens=2), *[LONG] * 7]):
        assert group[0].sampling_params.max_tokens == 2
        break
    pool.stream([[5]] * 2, LONG)  # dropped before it is even begun
    wait_until_idle(pool)
    generated = sum(stats.num_generated_tokens for stats in pool.stats().engines) - before
    assert 1 < generated < 9 * LONG.n * LONG.max_tokens / 4


def test_a_timeout_says_what_it_waited_for_and_aborts_it(pool):
    with pytest.raises(
        TimeoutError, match=r"4 of 4 groups are unfinished after 0.01 s \(engine 0: 2 groups, engine 1: 2"
    ):
        pool.generate([[5]] * 4, LONG, timeout=0.01)
    wait_until_idle(pool)


def test_aborted_groups_come_back_with_what_they_have(pool):
    stream = pool.stream([[5], [6]], LONG, group_ids=["stay", "go"])
    with pytest.raises(ValueError, match="no running group has the id 'unknown'"):
        pool.abort(["go", "unknown"])
    pool.abort(["go"])
    groups = {group[0].group_id: group for group in stream}
    assert {r.finish_reason for r in groups["go"]} == {"abort"}
    assert {r.finish_reason for r in groups["stay"]} == {"length"}
    assert all(len(r.token_ids) == len(r.logprobs) < 400 for r in groups["go"])
    with pytest.raises(ValueError, match="no running group has the id 'go'"):
        pool.abort(["go"])


def test_a_group_on_its_way_to_an_engine_is_aborted_there(pool, monkeypatch):
    """The coordinator has placed it, and its caller has not handed it over yet."""
    send = Submission._send
    threads = []

    def send_late(self, groups, placement):
        threads.append(threading.Thread(target=pool.abort, args=(["late"],)))
        threads[0].start()
        time.sleep(0.3)  # in which the order reaches the engine
        send(self, groups, placement)

    monkeypatch.setattr(Submission, "_send", send_late)
    [group] = pool.generate([[5]], LONG, group_ids=["late"])
    threads[0].join()
    assert {r.finish_reason for r in group} == {"abort"}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([""], {}, r"prompts\[0\].*empty"),
        ([], {}, "prompts is empty"),
        ([[5], [6] * 512], {}, r"prompts\[1\] has 512 tokens.*max_model_len=512"),
        ([[5]], {"group_ids": ["a", "b"]}, "group_ids has 2 entries for 1 prompts"),
        ([[5]], {"metadata": [3]}, r"metadata\[0\] must be a Mapping"),
        ([[5]], {"params": SamplingParams(n=300)}, "n=300 samples are more than an engine's max_num_seqs=256"),
    ],
)
def test_a_mistake_is_a_value_error_of_the_caller(pool, prompts, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        pool.generate(prompts, **{"params": PARAMS, **options})
    assert type(caught.value) is ValueError
    wait_until_idle(pool)


def test_a_running_group_id_cannot_be_used_again(pool):
    stream = pool.stream([[5]], LONG, group_ids=["twice"])
    with pytest.raises(ValueError, match="'twice' is still running"):
        pool.generate([[5]], PARAMS, group_ids=["twice"])
    stream.close()
    wait_until_idle(pool)
    assert len(pool.generate([[5]], PARAMS, group_ids=["twice"])[0]) == 3


def test_a_handle_generates_and_syncs_from_another_actor(single, rollouts, config, make_weights):
    @ray.remote(num_cpus=0)
    class Trainer:
        def __init__(self, handle: PoolHandle, make_weights) -> None:
            self.handle, self.make_weights = handle, make_weights

        def generate(self, prompts, params, group_ids):
            return self.handle.generate(prompts, params, group_ids=group_ids), self.handle.policy_version

        def sync(self, seed: int, policy_version: int):
            return self.handle.sync_weights(self.make_weights(seed).items(), policy_version)

    trainer = Trainer.remote(single.handle(), make_weights)
    assert ray.get(trainer.generate.remote(PROMPTS, PARAMS, IDS)) == (rollouts, 0)
    assert ray.get(trainer.sync.remote(3, 4)).is_lockstep
    assert single.policy_version == 4
    groups, version = ray.get(trainer.generate.remote(PROMPTS, PARAMS, IDS))
    assert version == 4
    assert groups == single.generate(PROMPTS, PARAMS, group_ids=IDS)
    assert groups != rollouts
    assert {v for group in groups for r in group for v in r.policy_versions} == {4}
    assert pickle.loads(pickle.dumps(single.handle())).policy_version == 4
    with pytest.raises(TypeError, match=r"pool.handle\(\)"):
        pickle.dumps(single)
    single.check_integrity()


def test_two_pools_in_one_process_share_neither_ids_nor_weights(pool, single, rollouts, make_weights):
    before = single.policy_version
    ours, theirs = (one.stream(PROMPTS, PARAMS, group_ids=IDS) for one in (pool, single))
    assert single.sync_weights(make_weights(8), before + 1, mode="abort").is_lockstep
    single.generate(PROMPTS[:2], PARAMS)
    assert sorted(ours, key=lambda group: IDS.index(group[0].group_id)) == rollouts
    assert len(list(theirs)) == len(IDS)
    assert (pool.policy_version, single.policy_version) == (0, before + 1)
    single.check_integrity()


def test_a_pool_may_be_left_to_start_and_a_dead_one_is_named(local_ray, config, rollouts, tmp_path):
    with RolloutPool(config, num_engines=1, seed=SEED, journal=tmp_path, wait_until_ready=False) as pool:
        assert pool.engine_infos == []
        handle = pickle.loads(pickle.dumps(pool.handle()))
        report = handle.sync_weights(dict(iter_weights(config.model)), 1)
        assert len(report.pause_seconds) == len(pool.engine_infos) == 1
        [group, *_] = handle.generate(PROMPTS[:2], PARAMS, group_ids=IDS[:2])
        assert [(r.token_ids, r.logprobs) for r in group] == [(r.token_ids, r.logprobs) for r in rollouts[0]]
        assert set(group[0].policy_versions) == {1}
    assert [switch.policy_version for switch in read_journal(tmp_path).switches()] == [1]
    pool.shutdown()  # once more does nothing
    assert ray.is_initialized()
    with pytest.raises(EngineError, match="the pool's coordinator died"):
        handle.generate([[5]], PARAMS)


def test_an_engine_that_cannot_start_is_an_error_with_its_cause(local_ray, config):
    def broken(config: EngineConfig):
        raise OSError("no room for it")

    with RolloutPool(config, engine_factory=broken, wait_until_ready=False) as pool:
        handle = pool.handle()
        for ready in (lambda: handle.kernel_fingerprint, pool.wait_until_ready):
            with pytest.raises(EngineError, match="engine 0 failed: OSError: no room for it"):
                ready()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_engines": 0}, "num_engines=0"),
        ({"seed": -1}, "seed=-1"),
        ({"num_engines": 3, "engine_cpus": 1}, "need more than the cluster's 2 CPUs"),
    ],
)
def test_options_that_cannot_work_are_refused(local_ray, config, options, message):
    with pytest.raises(ValueError, match=message):
        RolloutPool(config, **options)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config.json"):
        RolloutPool(EngineConfig(str(tmp_path)))


@pytest.mark.slow
def test_a_real_models_rollouts_do_not_depend_on_the_number_of_engines(local_ray, smollm2_dir):
    config, params = EngineConfig(str(smollm2_dir)), SamplingParams(n=4, max_tokens=12)
    prompts = [f"12 + 25 = 37\n7 + 18 = 25\n{i} + 6 =" for i in range(6)]
    drawn = []
    for num_engines in (1, 2):
        with RolloutPool(config, num_engines=num_engines, seed=SEED) as pool:
            drawn.append(pool.generate(prompts, params))
            pool.check_integrity()
    engine = LLMEngine(config)
    local = [
        engine.generate(prompt, SamplingParams(n=4, max_tokens=12, seed=derive_seed(SEED, f"g{i}")))[0]
        for i, prompt in enumerate(prompts)
    ]
    assert drawn[0] == drawn[1]
    assert [[(r.token_ids, r.logprobs) for r in group] for group in drawn[0]] == [
        [(c.token_ids, c.logprobs) for c in group] for group in local
    ]


def wait_until_idle(pool: RolloutPool) -> None:
    for engine in pool.engines:
        stats = ray.get(engine.stats.remote())
        deadline = time.monotonic() + 20
        while stats.num_requests_running + stats.num_requests_waiting:
            assert time.monotonic() < deadline, f"requests are still there: {stats}"
            time.sleep(0.01)
            stats = ray.get(engine.stats.remote())
