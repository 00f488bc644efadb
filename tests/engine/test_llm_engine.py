from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from engine.checkpoint import iter_weights


@pytest.fixture
def engine(tiny_model_dir: Callable[..., Path]) -> LLMEngine:
    return make_engine(tiny_model_dir())


def make_engine(model_dir: Path, **options: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(str(model_dir), **{"num_blocks": 64, **options}))


def test_completions_come_back_by_prompt_and_sample(engine: LLMEngine) -> None:
    prompts = ["the quick", [5, 6, 7], [{"role": "user", "content": "what is it?"}]]
    params = [SamplingParams(n=n, max_tokens=5 + n, ignore_eos=True) for n in (1, 2, 3)]
    groups = engine.generate(prompts, params)
    assert [[c.index for c in group] for group in groups] == [[0], [0, 1], [0, 1, 2]]
    for group, param in zip(groups, params, strict=True):
        for completion in group:
            assert len(completion.token_ids) == len(completion.logprobs) == len(completion.policy_versions)
            assert len(completion.token_ids) == param.max_tokens
            assert completion.finish_reason == "length"
            assert all(torch.tensor(x).item() == x and x <= 0 for x in completion.logprobs)
    engine.check_integrity()


def test_the_text_is_that_of_the_tokens(engine: LLMEngine) -> None:
    ((completion,),) = engine.generate("the sum of", SamplingParams(max_tokens=20, ignore_eos=True, seed=1))
    whole = engine.tokenizer.decode(engine.tokenizer("the sum of").input_ids + completion.token_ids)
    assert whole.endswith(completion.text)
    assert completion.text


def test_a_stop_string_ends_the_text_but_not_the_tokens(engine: LLMEngine) -> None:
    free = engine.generate("and then", SamplingParams(max_tokens=30, ignore_eos=True, seed=2))[0][0]
    stop = free.text[5:7]
    stopped = engine.generate("and then", SamplingParams(max_tokens=30, ignore_eos=True, seed=2, stop=stop))[0][0]
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason == stop
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert stop in engine.tokenizer.decode(stopped.token_ids)


def test_without_a_seed_requests_differ_and_a_rerun_repeats_them(tiny_model_dir: Callable[..., Path]) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = [make_engine(tiny_model_dir(), seed=seed).generate([[5, 6]] * 3, params) for seed in (1, 1, 2)]
    ids = [[tuple(group[0].token_ids) for group in groups] for groups in runs]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(ids[0])) == 3


def test_sampling_follows_the_models_distribution(engine: LLMEngine) -> None:
    """The share of each first token among many seeds lies near its exact probability."""
    groups = engine.generate([[9, 8, 7]] * 40, SamplingParams(n=50, max_tokens=1, ignore_eos=True))
    draws = [c for group in groups for c in group]
    probability = {c.token_ids[0]: torch.tensor(c.logprobs[0]).exp().item() for c in draws}
    for token_id, p in probability.items():
        share = sum(c.token_ids[0] == token_id for c in draws) / len(draws)
        assert abs(share - p) < 5 * (p * (1 - p) / len(draws)) ** 0.5 + 1e-3
    assert sum(probability.values()) > 0.9


BAD_REQUESTS = [
    ("", SamplingParams(), "empty"),
    ([], SamplingParams(), "empty"),
    ([5, 100000], SamplingParams(), "100000"),
    ([-1], SamplingParams(), "-1"),
    ([5] * 600, SamplingParams(), "512"),
    ([5] * 200, SamplingParams(max_tokens=300), "num_blocks=16"),
    ([{"role": "user"}], SamplingParams(), "content"),
    ([5], SamplingParams(n=10), "max_num_seqs=8"),
]


@pytest.mark.parametrize(("prompt", "params", "names"), BAD_REQUESTS)
def test_a_bad_request_is_refused_by_name_and_the_engine_goes_on(
    tiny_model_dir: Callable[..., Path], prompt: Any, params: SamplingParams, names: str
) -> None:
    engine = make_engine(tiny_model_dir(), num_blocks=16, max_num_seqs=8)
    with pytest.raises(ValueError, match=names):
        engine.add_request("bad", prompt, params)
    assert not engine.has_unfinished()
    assert len(engine.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0][0].token_ids) == 2
    engine.check_integrity()


def test_an_id_in_use_is_refused(engine: LLMEngine) -> None:
    engine.add_request("a", [5, 6])
    with pytest.raises(ValueError, match="'a'"):
        engine.add_request("a", [5, 6])


def test_one_bad_prompt_keeps_all_from_running(engine: LLMEngine) -> None:
    with pytest.raises(ValueError, match="prompt 1"):
        engine.generate([[5, 6], [], [7]])
    assert not engine.has_unfinished()
    engine.check_integrity()


def test_abort_gives_back_what_was_drawn(engine: LLMEngine) -> None:
    engine.add_request("a", [5, 6, 7], SamplingParams(n=2, max_tokens=50, ignore_eos=True))
    for _ in range(4):
        engine.step()
    completions = engine.abort(["a"])
    assert [(c.finish_reason, len(c.token_ids)) for c in completions] == [("abort", 4), ("abort", 4)]
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    with pytest.raises(ValueError, match="nobody"):
        engine.abort(["nobody"])


def test_a_time_limit_aborts_and_raises(engine: LLMEngine) -> None:
    with pytest.raises(TimeoutError, match="2 of 2"):
        engine.generate([[5], [6]], SamplingParams(max_tokens=400, ignore_eos=True), timeout=0.0)
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("arguments", "names"), [((1, "wait and see"), "wait and see"), ((-1,), "-1"), (("two",), "two")]
)
def test_a_bad_update_leaves_the_old_version_whole(engine: LLMEngine, arguments: tuple, names: str) -> None:
    checksum = engine.weights_checksum
    weights = dict(engine.model_runner.model.named_weights())
    with pytest.raises(ValueError, match=names):
        engine.update_weights(weights, *arguments)
    assert (engine.policy_version, engine.weights_checksum) == (0, checksum)


def test_a_refused_update_leaves_running_requests_as_they_were(tiny_model_dir: Callable[..., Path]) -> None:
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    undisturbed = make_engine(tiny_model_dir()).generate([[5, 6, 7]], params)[0][0]
    engine = make_engine(tiny_model_dir())
    engine.add_request("a", [5, 6, 7], params)
    for _ in range(3):
        engine.step()
    bad = {name: tensor.clone() for name, tensor in iter_weights(tiny_model_dir())}
    bad["model.norm.weight"][0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        engine.update_weights(bad, 1)
    finished = []
    while engine.has_unfinished():
        finished += engine.step().finished
    assert finished[0].logprobs == undisturbed.logprobs
    assert set(finished[0].policy_versions) == {0}


def test_a_step_that_fails_loses_no_request(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(n=2, max_tokens=12, seed=1, ignore_eos=True)
    expected = make_engine(tiny_model_dir()).generate([[5, 6, 7]], params)[0]
    engine = make_engine(tiny_model_dir())
    engine.add_request("a", [5, 6, 7], params)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_runner, "execute", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.check_integrity()
    finished = []
    while engine.has_unfinished():
        finished += engine.step().finished
    assert [c.logprobs for c in sorted(finished, key=lambda c: c.index)] == [c.logprobs for c in expected]


def _interrupt(plan: object) -> None:
    raise KeyboardInterrupt


def test_the_engine_needs_neither_ray_nor_datasets(tiny_model_dir: Callable[..., Path]) -> None:
    import subprocess

    code = (
        "import sys; sys.modules.update(ray=None, datasets=None)\n"
        "from engine import LLMEngine, EngineConfig, SamplingParams\n"
        f"e = LLMEngine(EngineConfig({str(tiny_model_dir())!r}, num_blocks=16))\n"
        "print(len(e.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))[0][0].token_ids))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "3", result.stderr


def test_a_default_pool_is_bounded_by_what_its_sequences_can_fill(tiny_model_dir: Callable[..., Path]) -> None:
    engine = make_engine(tiny_model_dir(), num_blocks=None, max_num_seqs=4, max_model_len=100)
    assert engine.stats().num_blocks == 4 * 7
    engine = make_engine(tiny_model_dir(), num_blocks=None, kv_cache_memory_bytes=2**20)
    assert engine.stats().num_blocks == 2**20 // (2 * 2 * 2 * 16 * 16 * 4)
    with pytest.raises(ValueError, match="kv_cache_memory_bytes=100"):
        make_engine(tiny_model_dir(), num_blocks=None, kv_cache_memory_bytes=100)


@pytest.mark.slow
def test_ten_thousand_requests_leave_every_block_free(tiny_model_dir: Callable[..., Path]) -> None:
    """Random lengths, aborts, forks, preemptions and weight updates; every sample ends exactly once."""
    engine = make_engine(tiny_model_dir(), num_blocks=30, max_num_seqs=32, max_num_batched_tokens=256)
    weights = dict(iter_weights(tiny_model_dir()))
    generator = random.Random(0)
    num_open: dict[str, int] = {}  # samples of each unfinished request

    def take(completions: list[Completion]) -> None:
        for completion in completions:
            num_open[completion.request_id] -= 1
            if not num_open[completion.request_id]:
                del num_open[completion.request_id]

    for i in range(10_000):
        num_open[f"r{i}"] = n = generator.choice([1, 1, 2, 4])
        params = SamplingParams(n=n, max_tokens=generator.choice([1, 8, 30, 120]), stop_token_ids=(7,))
        engine.add_request(f"r{i}", prompt_of_random_length(generator), params)
        while len(num_open) > 40 or (i == 9_999 and num_open):
            take(engine.step().finished)
            if num_open and generator.random() < 0.03:
                take(engine.abort([generator.choice(list(num_open))]))
            if generator.random() < 0.002:
                mode = generator.choice(["recompute", "keep"])
                engine.update_weights(weights, engine.policy_version + 1, mode=mode)
        if i % 100 == 0:
            engine.check_integrity()
    engine.check_integrity()
    stats = engine.stats()
    assert not engine.has_unfinished()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_preemptions > 100
    assert stats.policy_version > 10


def prompt_of_random_length(generator: random.Random) -> list[int]:
    return [generator.randrange(3, 300) for _ in range(generator.randrange(1, 60))]
