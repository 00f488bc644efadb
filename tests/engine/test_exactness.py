"""A request's tokens and log-probabilities are the same bits whatever it shares a batch with."""

from __future__ import annotations

import random

import pytest
import torch
from exactness_checks import (
    NEEDLE,
    PROMPT_LENGTH,
    Setting,
    all_bits,
    alone,
    bits,
    make_engine,
    prompt_of,
    random_mates,
    run,
    run_one,
    spread_weights,
)

from engine import SamplingParams
from engine.recorded_steps import RecordedSteps
from kernels.linear import unpack_rows


@pytest.mark.parametrize("num_mates", [1, 2, 6, 15, 31, 63, 127])
def test_a_needle_in_a_batch_equals_the_needle_alone(setting: Setting, num_mates: int) -> None:
    requests = list(random_mates(num_mates, seed=num_mates).items())
    requests.insert(num_mates // 2, ("needle", (prompt_of(0), NEEDLE)))
    engine = make_engine(setting, num_blocks=1600, max_num_batched_tokens=256)
    assert bits(run(engine, dict(requests))["needle"][0]) == alone(setting)


def test_an_engine_on_torchs_linear_would_not_pass(tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: torch chooses how to add by the number of rows, and the needle notices its company."""

    def torchs_linear(x, packed, num_outputs, bias, master, is_dot):
        x = x.bfloat16().float() if is_dot else x
        return torch.nn.functional.linear(x, unpack_rows(packed, 0, num_outputs), bias)

    monkeypatch.setattr("engine.cpu_ops.linear", torchs_linear)
    monkeypatch.setattr(RecordedSteps, "run", lambda self, num_rows, forward: forward())  # it would refuse torch's
    by_itself = run_one(make_engine(tiny_setting), prompt_of(0))
    batched = run(make_engine(tiny_setting), {**random_mates(15, seed=15), "needle": (prompt_of(0), NEEDLE)})["needle"]
    assert bits(batched[0]) != bits(by_itself)


def test_recorded_steps_give_the_bits_of_the_forward_that_they_repeat(
    tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = run(make_engine(tiny_setting), random_mates(20, seed=16))
    monkeypatch.setattr(RecordedSteps, "run", lambda self, num_rows, forward: forward())
    assert all_bits(run(make_engine(tiny_setting), random_mates(20, seed=16))) == all_bits(recorded)


def test_weights_of_spread_exponents_change_nothing(tiny_setting: Setting) -> None:
    """Sums of such operands differ in their bits for almost any other order of addition."""
    engine = make_engine(tiny_setting)
    engine.update_weights(spread_weights(tiny_setting), 1)
    by_itself = run_one(engine, prompt_of(0))
    engine = make_engine(tiny_setting, max_num_batched_tokens=256)
    engine.update_weights(spread_weights(tiny_setting), 1)
    batched = run(engine, {**random_mates(40, seed=3), "needle": (prompt_of(0), NEEDLE)})["needle"][0]
    assert bits(batched) == bits(by_itself)
    assert len(set(by_itself.token_ids)) > 3


def test_two_different_batches_agree_on_what_they_share(tiny_setting: Setting) -> None:
    shared = random_mates(8, seed=5)
    first = run(make_engine(tiny_setting), {**shared, "extra": (prompt_of(77, 200), NEEDLE)})
    second = run(make_engine(tiny_setting, max_num_batched_tokens=37), dict(reversed(shared.items())))
    third = run(make_engine(tiny_setting), {**random_mates(50, seed=6), **{f"s-{i}": r for i, r in shared.items()}})
    for request_id in shared:
        assert all_bits(first)[request_id] == all_bits(second)[request_id] == all_bits(third)[f"s-{request_id}"]


@pytest.mark.parametrize("place", [0, 5, 11, 20])
def test_the_place_in_the_batch_does_not_show(tiny_setting: Setting, place: int) -> None:
    requests = list(random_mates(20, seed=7).items())
    requests.insert(place, ("needle", (prompt_of(0), NEEDLE)))
    assert bits(run(make_engine(tiny_setting), dict(requests))["needle"][0]) == alone(tiny_setting)


@pytest.mark.parametrize("order_seed", [1, 2, 3])
def test_the_order_of_arrival_does_not_show(tiny_setting: Setting, order_seed: int) -> None:
    requests = random_mates(12, seed=8)
    permuted = list(requests.items())
    random.Random(order_seed).shuffle(permuted)
    assert list(dict(permuted)) != list(requests)
    assert all_bits(run(make_engine(tiny_setting), dict(permuted))) == all_bits(
        run(make_engine(tiny_setting), requests)
    )


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_identical_requests_get_identical_bits(tiny_setting: Setting, enable_prefix_caching: bool) -> None:
    engine = make_engine(tiny_setting, enable_prefix_caching=enable_prefix_caching)
    twins = run(engine, {f"twin-{i}": (prompt_of(0), NEEDLE) for i in range(30)})
    expected = alone(tiny_setting)
    assert all(bits(completions[0]) == expected for completions in twins.values())


def test_samples_of_a_group_do_not_depend_on_its_size(setting: Setting) -> None:
    groups = {}
    for n in (1, 3, 8):
        groups[n] = run(make_engine(setting), {"g": (prompt_of(0), SamplingParams(n=n, max_tokens=12, seed=3))})["g"]
    assert list(map(bits, groups[3])) == list(map(bits, groups[8]))[:3]
    assert bits(groups[1][0]) == bits(groups[8][0])
    assert len({tuple(completion.token_ids) for completion in groups[8]}) == 8


def test_a_group_computes_its_prompt_once_and_copies_the_last_block_on_write(tiny_setting: Setting) -> None:
    engine = make_engine(tiny_setting)
    run(engine, {"g": (prompt_of(0), SamplingParams(n=8, max_tokens=4, seed=3, ignore_eos=True))})
    assert engine.stats().num_scheduled_tokens == PROMPT_LENGTH + 8 * 3


@pytest.mark.slow
def test_every_number_of_rows_up_to_300_gives_the_same_bits(tiny_setting: Setting) -> None:
    """Every step after the first has exactly so many rows, the needle's among them."""
    params = SamplingParams(max_tokens=5, seed=11, temperature=0.9, ignore_eos=True)
    expected = bits(run_one(make_engine(tiny_setting), prompt_of(0), params))
    for num_rows in range(1, 301):
        requests = {f"mate-{i}": (prompt_of(i, 2), params) for i in range(num_rows - 1)}
        items = list(requests.items())
        items.insert(num_rows // 3, ("needle", (prompt_of(0), params)))
        engine = make_engine(tiny_setting, max_num_seqs=300)
        assert bits(run(engine, dict(items))["needle"][0]) == expected, f"{num_rows} rows"
        assert engine.stats().num_scheduled_tokens == PROMPT_LENGTH + 2 * (num_rows - 1) + 4 * num_rows
