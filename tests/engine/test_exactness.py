"""A request's tokens and log-probabilities are the same bits whatever it shares the engine with."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels
from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.checkpoint import iter_weights
from engine.model import Transformer
from engine.model_config import ModelConfig
from kernels.logprobs import token_logprobs

MODELS = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow)]
# Wide enough that sums over k span several blocks of 128, the last one ragged: else any order of summation would do.
TINY = {
    "hidden_size": 288,
    "head_dim": 32,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 520,
}
NEEDLE = SamplingParams(max_tokens=20, seed=11, temperature=0.9, ignore_eos=True)
PROMPT_LENGTH = 45


@pytest.fixture(params=MODELS)
def model_dir(request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]) -> Path:
    if request.param == "tiny":
        return tiny_model_dir("llama", **TINY)
    return request.getfixturevalue("smollm2_dir")


def make_engine(model_dir: Path, **options: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(str(model_dir), **{"num_blocks": 600, "num_threads": 2, **options}))


def prompt_of(seed: int, length: int = PROMPT_LENGTH) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 300) for _ in range(length)]


def bits(completion: Completion) -> tuple[list[int], list[int]]:
    return completion.token_ids, torch.tensor(completion.logprobs).view(torch.int32).tolist()


def run(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict[str, list[Completion]]:
    """Completions by request id, sorted by index; all requests arrive at once."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    return drain(engine, list(requests))


def drain(engine: LLMEngine, request_ids: list[str]) -> dict[str, list[Completion]]:
    done: dict[str, list[Completion]] = {request_id: [] for request_id in request_ids}
    while engine.has_unfinished():
        for completion in engine.step().finished:
            done[completion.request_id].append(completion)
    engine.check_integrity()
    return {request_id: sorted(completions, key=lambda c: c.index) for request_id, completions in done.items()}


def alone(model_dir: Path, **options: Any) -> tuple[list[int], list[int]]:
    return bits(run(make_engine(model_dir, **options), {"needle": (prompt_of(0), NEEDLE)})["needle"][0])


def random_mates(count: int, seed: int) -> dict[str, tuple[list[int], SamplingParams]]:
    generator = random.Random(seed)
    return {
        f"mate-{i}": (
            prompt_of(1000 * seed + i, generator.randrange(1, 120)),
            SamplingParams(
                max_tokens=generator.randrange(1, 30), temperature=generator.choice([0.0, 0.7, 1.0]), seed=i,
                n=generator.choice([1, 1, 3]), ignore_eos=True,
            ),
        )
        for i in range(count)
    }  # fmt: skip


@pytest.mark.parametrize("num_mates", [1, 2, 6, 15, 31, 63])
def test_a_needle_in_a_batch_equals_the_needle_alone(model_dir: Path, num_mates: int) -> None:
    requests = list(random_mates(num_mates, seed=num_mates).items())
    requests.insert(num_mates // 2, ("needle", (prompt_of(0), NEEDLE)))
    batched = run(make_engine(model_dir, max_num_batched_tokens=256), dict(requests))["needle"][0]
    assert bits(batched) == alone(model_dir)


def test_two_different_batches_agree_on_what_they_share(tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("llama", **TINY)
    shared = random_mates(8, seed=5)
    first = run(make_engine(model_dir), {**shared, "extra": (prompt_of(77, 200), NEEDLE)})
    second = run(make_engine(model_dir, max_num_batched_tokens=37), dict(reversed(shared.items())))
    for request_id in shared:
        assert list(map(bits, first[request_id])) == list(map(bits, second[request_id]))


def test_every_chunk_size_gives_the_same_bits(tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("llama", **TINY)
    expected = alone(model_dir)
    for chunk in range(1, PROMPT_LENGTH + 2):
        assert alone(model_dir, max_num_batched_tokens=chunk) == expected, f"chunks of {chunk} tokens"


@pytest.mark.parametrize("chunk", [1, 7, 16, 30])
def test_chunked_prefill_of_a_long_prompt_crosses_attention_chunks(model_dir: Path, chunk: int) -> None:
    request = {"long": (prompt_of(3, 300), NEEDLE)}
    whole = run(make_engine(model_dir), request)["long"][0]
    cut = run(make_engine(model_dir, long_prefill_token_threshold=chunk), request)["long"][0]
    assert bits(cut) == bits(whole)


def test_a_hot_prefix_cache_gives_the_bits_of_a_cold_one(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    cold = run(engine, {"cold": (prompt_of(0), NEEDLE)})["cold"][0]
    hot = run(engine, {"hot": (prompt_of(0), NEEDLE)})["hot"][0]
    assert engine.stats().prefix_cache_hits >= 32
    assert bits(hot) == bits(cold) == alone(model_dir, enable_prefix_caching=False)


@pytest.mark.parametrize("num_blocks", [8, 11, 16])
def test_preempted_requests_give_the_bits_of_undisturbed_ones(model_dir: Path, num_blocks: int) -> None:
    requests = {f"r{i}": (prompt_of(i, 40), SamplingParams(max_tokens=40, seed=i, ignore_eos=True)) for i in range(4)}
    tight = make_engine(model_dir, num_blocks=num_blocks)
    squeezed = run(tight, requests)
    assert tight.stats().num_preemptions > 0
    assert tight.stats().num_free_blocks == num_blocks
    undisturbed = run(make_engine(model_dir), requests)
    for request_id in requests:
        assert bits(squeezed[request_id][0]) == bits(undisturbed[request_id][0])


def test_samples_of_a_group_do_not_depend_on_its_size(model_dir: Path) -> None:
    groups = {}
    for n in (1, 3, 8):
        groups[n] = run(make_engine(model_dir), {"g": (prompt_of(0), SamplingParams(n=n, max_tokens=12, seed=3))})["g"]
    assert list(map(bits, groups[3])) == list(map(bits, groups[8]))[:3]
    assert bits(groups[1][0]) == bits(groups[8][0])
    assert len({tuple(completion.token_ids) for completion in groups[8]}) == 8


def test_a_group_computes_its_prompt_once_and_copies_the_last_block_on_write(
    tiny_model_dir: Callable[..., Path],
) -> None:
    engine = make_engine(tiny_model_dir("llama", **TINY))
    run(engine, {"g": (prompt_of(0), SamplingParams(n=8, max_tokens=4, seed=3, ignore_eos=True))})
    assert engine.stats().num_scheduled_tokens == PROMPT_LENGTH + 8 * 3


@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_the_block_size_does_not_show(model_dir: Path, block_size: int) -> None:
    assert alone(model_dir, block_size=block_size, num_blocks=40) == alone(model_dir)


@pytest.mark.parametrize("num_threads", [1, 3, 4])
def test_the_number_of_threads_does_not_show(model_dir: Path, num_threads: int) -> None:
    expected = run(make_engine(model_dir), random_mates(5, seed=1))
    got = run(make_engine(model_dir, num_threads=num_threads), random_mates(5, seed=1))
    assert kernels.get_num_threads() == num_threads
    kernels.set_num_threads(2)
    for request_id, completions in expected.items():
        assert list(map(bits, got[request_id])) == list(map(bits, completions))


def test_a_process_that_hogs_the_cores_does_not_show(model_dir: Path) -> None:
    expected = run(make_engine(model_dir), random_mates(5, seed=2))
    with hogged_cores():
        got = run(make_engine(model_dir), random_mates(5, seed=2))
    for request_id, completions in expected.items():
        assert list(map(bits, got[request_id])) == list(map(bits, completions))


@contextmanager
def hogged_cores() -> Iterator[None]:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def trainer_logprobs(model: Transformer, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """Log-probabilities of a completion from one packed forward of the trainer's model, with autograd on."""
    input_ids = torch.tensor(prompt + completion.token_ids[:-1])
    attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=len(input_ids))])
    hidden = model(input_ids, torch.arange(len(input_ids)), attention)[len(prompt) - 1 :]
    assert hidden.requires_grad
    temperatures = torch.full((hidden.shape[0],), temperature)
    head = model.lm_head
    return token_logprobs(
        hidden, head.packed, head.num_outputs, torch.tensor(completion.token_ids), temperatures, head.master
    ).detach()


def load_trainer_model(model_dir: Path) -> Transformer:
    model = Transformer(ModelConfig.from_directory(model_dir), with_masters=True)
    model.load_weights(iter_weights(model_dir))
    return model


FAMILIES = [
    ("llama", {}),
    ("llama", TINY),
    ("llama", {"tie_word_embeddings": False}),
    ("mistral", {}),
    ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 300}),
    ("qwen3", {"head_dim": 32}),
    ("mistral", {"sliding_window": 13}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_decode_equals_prefill_equals_the_trainers_forward(
    tiny_model_dir: Callable[..., Path], family: str, overrides: dict[str, Any]
) -> None:
    model_dir = tiny_model_dir(family, **overrides)
    check_three_way(model_dir)


@pytest.mark.slow
def test_decode_equals_prefill_equals_the_trainers_forward_on_smollm2(smollm2_dir: Path) -> None:
    check_three_way(smollm2_dir)


def check_three_way(model_dir: Path) -> None:
    prompt = prompt_of(9)
    engine = make_engine(model_dir)
    decoded = run(engine, {"decode": (prompt, SamplingParams(max_tokens=24, seed=1, ignore_eos=True))})["decode"][0]
    for length in (1, 5, 17):  # a prefill up to there must draw the same next token with the same log-probability
        prefix = prompt + decoded.token_ids[:length]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        greedy = run(make_engine(model_dir), {"p": (prefix, params)})["p"][0]
        redecoded = run(engine, {f"d{length}": (prefix, params)})[f"d{length}"][0]
        assert bits(greedy) == bits(redecoded)
    trainer = trainer_logprobs(load_trainer_model(model_dir), prompt, decoded, temperature=1.0)
    assert torch.equal(trainer.view(torch.int32), torch.tensor(decoded.logprobs).view(torch.int32))


def test_the_comparison_notices_torchs_own_linear(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one operation swapped for torch's on the trainer's side, and the bits part."""
    model_dir = tiny_model_dir("llama", **TINY)
    prompt = prompt_of(9)
    decoded = run(make_engine(model_dir), {"d": (prompt, SamplingParams(max_tokens=24, seed=1, ignore_eos=True))})["d"][
        0
    ]
    model = load_trainer_model(model_dir)
    monkeypatch.setattr(
        "engine.cpu_ops.linear", lambda x, packed, n, bias, master, is_dot: torch.nn.functional.linear(x, master, bias)
    )
    swapped = trainer_logprobs(model, prompt, decoded, temperature=1.0)
    assert not torch.equal(swapped, torch.tensor(decoded.logprobs))
    assert torch.allclose(swapped, torch.tensor(decoded.logprobs), atol=1e-4)


def perturbed(model_dir: Path, scale: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor.float() + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in iter_weights(model_dir)
    }


def test_an_update_under_running_requests_is_exact_token_by_token(model_dir: Path) -> None:
    """Each token's log-probability is the trainer's under the version that the engine stamped on it."""
    versions = {0: dict(iter_weights(model_dir)), 1: perturbed(model_dir, 0.01), 2: perturbed(model_dir, 0.02)}
    engine = make_engine(model_dir, max_num_batched_tokens=64)
    params = SamplingParams(n=2, max_tokens=24, seed=4, ignore_eos=True)
    prompts = {f"r{i}": prompt_of(i) for i in range(3)}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    done: list[Completion] = []
    for step in range(1000):
        if step in (7, 15):
            engine.update_weights(versions[engine.policy_version + 1], engine.policy_version + 1)
        done += engine.step().finished
        if not engine.has_unfinished():
            break
    engine.check_integrity()
    assert len(done) == 6
    model = Transformer(ModelConfig.from_directory(model_dir), with_masters=True)
    seen = set()
    for version, weights in versions.items():
        model.load_weights(weights)
        for completion in done:
            expected = trainer_logprobs(model, prompts[completion.request_id], completion, temperature=1.0)
            drawn = torch.tensor(completion.policy_versions) == version
            assert torch.equal(expected[drawn], torch.tensor(completion.logprobs)[drawn])
            seen.update(completion.policy_versions)
            assert completion.is_exact
    assert seen == {0, 1, 2}


def test_no_stale_prefix_is_hit_after_an_update(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    run(engine, {"warm": (prompt_of(0), NEEDLE)})
    new = perturbed(model_dir, 0.02)
    engine.update_weights(new, 1)
    hits = engine.stats().prefix_cache_hits
    updated = run(engine, {"needle": (prompt_of(0), NEEDLE)})["needle"][0]
    assert engine.stats().prefix_cache_hits == hits
    fresh = make_engine(model_dir)
    fresh.update_weights(new, 1)
    assert bits(updated) == bits(run(fresh, {"needle": (prompt_of(0), NEEDLE)})["needle"][0])


def test_the_old_weights_under_an_old_number_find_their_own_blocks_again(tiny_model_dir: Callable[..., Path]) -> None:
    """Blocks are named by the weights themselves: a trainer that starts over may reuse version numbers."""
    model_dir = tiny_model_dir("llama", **TINY)
    engine = make_engine(model_dir)
    first = run(engine, {"a": (prompt_of(0), NEEDLE)})["a"][0]
    engine.update_weights(perturbed(model_dir, 0.02), 1)
    changed = run(engine, {"b": (prompt_of(0), NEEDLE)})["b"][0]
    engine.update_weights(dict(iter_weights(model_dir)), 1)
    hits = engine.stats().prefix_cache_hits
    again = run(engine, {"c": (prompt_of(0), NEEDLE)})["c"][0]
    assert engine.stats().prefix_cache_hits > hits
    assert bits(again) == bits(first) != bits(changed)


def test_keep_goes_on_with_old_blocks_and_says_so(tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("llama", **TINY)
    engine = make_engine(model_dir)
    engine.add_request("kept", prompt_of(0), SamplingParams(max_tokens=16, seed=1, ignore_eos=True))
    for _ in range(6):
        engine.step()
    scheduled = engine.stats().num_scheduled_tokens
    engine.update_weights(perturbed(model_dir, 0.01), 1, mode="keep")
    kept = drain(engine, ["kept"])["kept"][0]
    assert engine.stats().num_scheduled_tokens - scheduled == 10  # nothing was computed again
    assert not kept.is_exact
    assert kept.policy_versions == [0] * 6 + [1] * 10
    clean = run(engine, {"clean": (prompt_of(0), NEEDLE)})["clean"][0]
    fresh = make_engine(model_dir)
    fresh.update_weights(perturbed(model_dir, 0.01), 1)
    assert bits(clean) == bits(run(fresh, {"clean": (prompt_of(0), NEEDLE)})["clean"][0])
