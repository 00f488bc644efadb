"""A request with truncation, penalties or bias gives the same bits whatever it shares the engine with."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.checkpoint import iter_weights
from engine.model import Transformer
from engine.model_config import ModelConfig
from kernels.linear import linear
from kernels.logprobs import token_logprobs

# Wide enough that sums over k span several blocks of 128, the last one ragged.
TINY = {
    "hidden_size": 288,
    "head_dim": 32,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 520,
}
VOCAB_SIZE, EOS = 320, 2
COMMON = {"max_tokens": 14, "seed": 11, "temperature": 0.9, "ignore_eos": True}
NEEDLES = {
    "top_p": SamplingParams(top_p=0.8, **COMMON),
    "top_k": SamplingParams(top_k=7, logprobs=3, **COMMON),
    "min_p": SamplingParams(min_p=0.05, n=3, **COMMON),
    "penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, **COMMON),
    "all": SamplingParams(
        top_p=0.95, top_k=40, min_p=0.01, repetition_penalty=1.1, frequency_penalty=-0.2, logit_bias={5: 3.0, 9: -4.0},
        allowed_token_ids=range(3, 250), bad_words=["the", "a"], logprobs=5, n=2, **COMMON,
    ),
    "min_tokens": SamplingParams(max_tokens=14, seed=3, min_tokens=6, stop_token_ids=[17, 40]),
    "greedy": SamplingParams(max_tokens=14, temperature=0.0, repetition_penalty=1.2, ignore_eos=True),
    "top list alone": SamplingParams(logprobs=4, **COMMON),
}  # fmt: skip


@pytest.fixture
def model_dir(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama", **TINY)


def make_engine(model_dir: Path, **options: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(str(model_dir), **{"num_blocks": 600, "num_threads": 2, **options}))


def prompt_of(seed: int, length: int = 45) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 300) for _ in range(length)]


def words(values: list[float] | None) -> list[int] | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()


def bits(completion: Completion) -> tuple:
    """All that is reported, as bit patterns."""
    top = completion.top_logprobs
    return (
        completion.token_ids, words(completion.logprobs), words(completion.raw_logprobs), words(completion.kept_mass),
        None if top is None else [(list(one), words(list(one.values()))) for one in top],
    )  # fmt: skip


def run(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[tuple]]:
    """The bits of every completion by request id, by index; all requests arrive at once."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    done: dict[str, list[Completion]] = {request_id: [] for request_id in requests}
    while engine.has_unfinished():
        for completion in engine.step().finished:
            done[completion.request_id].append(completion)
    engine.check_integrity()
    return {request_id: [bits(c) for c in sorted(group, key=lambda c: c.index)] for request_id, group in done.items()}


def needles() -> dict[str, tuple[list[int], SamplingParams]]:
    return {name: (prompt_of(i), params) for i, (name, params) in enumerate(NEEDLES.items())}


@pytest.fixture
def alone(model_dir: Path) -> dict[str, list[tuple]]:
    """Each needle in an engine that does nothing else."""
    engine = make_engine(model_dir, enable_prefix_caching=False)
    return {name: run(engine, {name: request})[name] for name, request in needles().items()}


def random_mates(count: int, seed: int) -> dict[str, tuple[list[int], SamplingParams]]:
    generator = random.Random(seed)
    return {
        f"mate-{i}": (
            prompt_of(1000 * seed + i, generator.randrange(1, 120)),
            SamplingParams(
                max_tokens=generator.randrange(1, 20), temperature=generator.choice([0.0, 0.7, 1.0]), seed=i,
                n=generator.choice([1, 1, 3]), ignore_eos=True, top_p=generator.choice([1.0, 1.0, 0.7]),
                top_k=generator.choice([0, 0, 5]), presence_penalty=generator.choice([0.0, 0.0, 1.0]),
                logprobs=generator.choice([0, 0, 2]),
            ),
        )
        for i in range(count)
    }  # fmt: skip


@pytest.mark.parametrize("num_mates", [0, 5, 20])
def test_needles_in_a_batch_equal_the_needles_alone(model_dir, alone, num_mates):
    requests = list({**random_mates(num_mates, seed=1 + num_mates), **needles()}.items())
    random.Random(num_mates).shuffle(requests)
    batched = run(make_engine(model_dir, max_num_batched_tokens=128), dict(requests))
    for name, expected in alone.items():
        assert batched[name] == expected, name


@pytest.mark.parametrize("chunk", [1, 7, 44])
def test_chunks_do_not_show(model_dir, alone, chunk):
    chunked = run(make_engine(model_dir, long_prefill_token_threshold=chunk), needles())
    assert chunked == alone


def test_a_hot_prefix_cache_does_not_show(model_dir, alone):
    engine = make_engine(model_dir)
    assert run(engine, needles()) == alone
    hits = engine.stats().prefix_cache_hits
    assert run(engine, needles()) == alone
    assert engine.stats().prefix_cache_hits >= hits + 32 * len(NEEDLES)


def test_preemption_does_not_show(model_dir, alone):
    tight = make_engine(model_dir, num_blocks=13)
    assert run(tight, needles()) == alone
    assert tight.stats().num_preemptions > 0


def test_samples_of_a_group_do_not_depend_on_its_size(model_dir):
    groups = {
        n: run(make_engine(model_dir), {"g": (prompt_of(0), replace(NEEDLES["all"], n=n))})["g"] for n in (1, 3, 8)
    }
    assert groups[1] == groups[8][:1]
    assert groups[3] == groups[8][:3]
    assert len({tuple(token_ids) for token_ids, *_ in groups[8]}) == 8


def test_plain_requests_keep_their_bits_beside_truncated_ones(model_dir):
    plain = {f"p{i}": (prompt_of(i), SamplingParams(seed=i, temperature=0.8, ignore_eos=True)) for i in range(6)}
    mixed = run(make_engine(model_dir), {**needles(), **plain})
    for name, group in run(make_engine(model_dir), plain).items():
        assert mixed[name] == group
        assert group[0][2:] == (None, None, None)


def test_asking_for_top_logprobs_changes_no_token_and_no_logprob(model_dir):
    params = SamplingParams(**COMMON)
    plain = run(make_engine(model_dir), {"r": (prompt_of(0), params)})["r"][0]
    listed = run(make_engine(model_dir), {"r": (prompt_of(0), replace(params, logprobs=4))})["r"][0]
    assert listed[:4] == plain[:4]
    for token_id, logprob, (top_ids, top_words) in zip(*listed[:2], listed[4], strict=True):
        top = torch.tensor(top_words, dtype=torch.int32).view(torch.float32)
        assert len(top_ids) in (4, 5)
        assert top[:4].tolist() == sorted(top[:4].tolist(), reverse=True)
        assert top_words[top_ids.index(token_id)] == logprob


def trainer_hidden(model: Transformer, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """Hidden states that predict a completion, from one packed forward."""
    input_ids = torch.tensor(prompt + token_ids[:-1])
    attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=len(input_ids))], model.ops)
    with torch.no_grad():
        return model(input_ids, torch.arange(len(input_ids)), attention)[len(prompt) - 1 :]


def test_raw_logprobs_are_the_trainers_at_temperature_one(model_dir, alone):
    model = Transformer(ModelConfig.from_directory(model_dir))
    model.load_weights(iter_weights(model_dir))
    head = model.lm_head
    for name, (prompt, _) in needles().items():
        for token_ids, logprobs, raw, kept_mass, top in alone[name]:
            assert (raw is None) == (kept_mass is None) == (name == "top list alone")
            assert (top is None) == (NEEDLES[name].logprobs == 0)
            temperature = 1.0 if raw else NEEDLES[name].temperature
            expected = token_logprobs(
                trainer_hidden(model, prompt, token_ids), head.packed, head.num_outputs, torch.tensor(token_ids),
                torch.full((len(token_ids),), temperature),
            )  # fmt: skip
            assert words(expected.tolist()) == (raw or logprobs)


def test_processed_logprobs_and_kept_mass_are_those_of_a_plain_softmax(model_dir):
    params = SamplingParams(top_p=0.7, repetition_penalty=1.3, frequency_penalty=0.3, **COMMON)
    engine = make_engine(model_dir)
    completion = engine.generate([prompt_of(0)], params)[0][0]
    model, seen = engine.model_runner.model, Counter()
    hidden = trainer_hidden(model, prompt_of(0), completion.token_ids)
    logits_CV = linear(hidden, model.lm_head.packed, VOCAB_SIZE).double()
    for z, token_id, logprob, kept_mass in zip(
        logits_CV, completion.token_ids, completion.logprobs, completion.kept_mass, strict=True
    ):
        for i in {*prompt_of(0), *seen}:
            z[i] = z[i] / 1.3 if z[i] > 0 else z[i] * 1.3
        for i, count in seen.items():
            z[i] -= 0.3 * count
        probabilities = (z / 0.9).softmax(0)
        ordered, order = probabilities.sort(descending=True)
        kept = order[ordered.cumsum(0) - ordered < 0.7]
        assert token_id in kept
        assert abs(probabilities[kept].sum().item() - kept_mass) < 1e-5
        assert abs((probabilities[token_id] / probabilities[kept].sum()).log().item() - logprob) < 1e-5
        seen[token_id] += 1


def test_stop_tokens_are_not_drawn_before_min_tokens(model_dir):
    params = SamplingParams(n=16, seed=1, max_tokens=12, min_tokens=5, stop_token_ids=range(3, 280))
    completions = make_engine(model_dir).generate([prompt_of(0)], params)[0]
    for completion in completions:
        stops = [token_id in (EOS, *range(3, 280)) for token_id in completion.token_ids]
        assert not any(stops[:5])
        assert len(completion.token_ids) > 5
    assert any(completion.finish_reason == "stop" for completion in completions)
    loose = make_engine(model_dir).generate([prompt_of(0)], replace(params, min_tokens=0))[0]
    assert any(len(completion.token_ids) <= 5 for completion in loose)


def test_allowed_ids_bias_and_bad_words_hold(model_dir):
    engine = make_engine(model_dir)
    allowed = [100, 101, 102, 103]
    params = SamplingParams(allowed_token_ids=allowed, logit_bias={101: -100.0}, max_tokens=60, seed=1, ignore_eos=True)
    drawn = engine.generate([prompt_of(0)], params)[0][0].token_ids
    assert set(drawn) == {100, 102, 103}
    tokenizer = engine.tokenizer
    first, second = tokenizer.encode("7"), tokenizer.encode("8")
    pair = SamplingParams(
        allowed_token_ids=first + second, bad_words=["78"], max_tokens=60, seed=1, temperature=20.0, ignore_eos=True
    )
    assert tokenizer.encode("78") == first + second
    text = engine.generate([prompt_of(0)], pair)[0][0].text
    assert "78" not in text
    assert "87" in text
    assert "78" in engine.generate([prompt_of(0)], replace(pair, bad_words=()))[0][0].text


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {320: 1.0}}, "logit_bias names token id 320, outside the vocabulary of 320"),
        ({"allowed_token_ids": [1, 400]}, "allowed_token_ids names token id 400"),
        ({"allowed_token_ids": [2], "min_tokens": 3}, r"allowed_token_ids=\[2\] are all barred"),
    ],
)
def test_what_the_model_cannot_serve_is_refused(model_dir, params, message):
    with pytest.raises(ValueError, match=message):
        make_engine(model_dir).add_request("r", [5, 6], SamplingParams(**params))
