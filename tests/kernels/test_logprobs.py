from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_rows_do_not_depend_on_their_number,
    assert_same_bits,
    num_different,
    pack,
    spread,
)

from kernels import reference
from kernels.library import set_num_threads
from kernels.logprobs import sample, token_logprobs, vocab_stats
from kernels.profiles import PROFILES

WIDTH, VOCAB = 72, 64 * 5 + 17
TEMPERATURES = torch.tensor([1.0, 0.7, 2.0, 1e-5, 30.0])


every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())


def make_head(num_rows: int, *, seed: int, vocab_size: int = VOCAB, size: float = 0.05, dtype=torch.float32):
    """(hidden [T, D], weight [V, D] of a type, temperature [T]) with logits of a few units."""
    hidden, weight = (
        spread(num_rows, WIDTH, seed=seed, low=-2, high=2),
        spread(vocab_size, WIDTH, seed=seed + 1, low=-2, high=2),
    )
    return hidden, (weight * size).to(dtype), TEMPERATURES[torch.arange(num_rows) % len(TEMPERATURES)].clone()


def make_draws(num_draws: int, num_rows: int, *, seed: int):
    """Arguments of `sample` after the temperature: random rows, 64-bit seeds, positions and indices; a fifth greedy."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, num_rows, (num_draws,), generator=generator)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_draws,), generator=generator)
    positions = torch.randint(0, 3000, (num_draws,), generator=generator)
    indices = torch.randint(0, 16, (num_draws,), generator=generator)
    is_greedy = (torch.rand(num_draws, generator=generator) < 0.2).to(torch.uint8)
    return rows, seeds, positions, indices, is_greedy


@every_profile
@pytest.mark.parametrize("vocab_size", [1, 16, 40, 64, 65, VOCAB, 512])
def test_block_statistics_equal_the_reference(profile, vocab_size):
    hidden, weight, temperature = make_head(13, seed=1, vocab_size=vocab_size, dtype=profile.weight_dtype)
    expected = reference.vocab_stats(hidden, weight, temperature, profile.is_dot)
    actual = vocab_stats(hidden, pack(weight), vocab_size, temperature, profile.is_dot)
    for one, wanted in zip(actual, expected):
        assert_same_bits(one, wanted)


@every_profile
@pytest.mark.parametrize("vocab_size", [1, 40, 64, VOCAB, 4000])
def test_every_number_of_rows_equals_the_reference(profile, vocab_size):
    num_rows = 130 if vocab_size < 4000 else 20
    hidden, weight, temperature = make_head(num_rows, seed=3, vocab_size=vocab_size, dtype=profile.weight_dtype)
    targets = torch.randint(0, vocab_size, (len(hidden),), generator=torch.Generator().manual_seed(4))
    packed = pack(weight)

    def run(rows):
        n = len(rows)
        return token_logprobs(rows, packed, vocab_size, targets[:n], temperature[:n], is_dot=profile.is_dot)

    expected = reference.token_logprobs(hidden, weight, targets, temperature, profile.is_dot)
    assert_rows_do_not_depend_on_their_number(run, hidden, expected)


@pytest.mark.slow
@every_profile
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 5, 6, 7])
def test_every_number_of_rows_up_to_300_in_a_models_width(profile, num_threads):
    hidden, weight = spread(300, 576, seed=30, low=-2, high=2), spread(4001, 576, seed=31, low=-2, high=2)
    weight, temperature = (weight * 0.05).to(profile.weight_dtype), TEMPERATURES.repeat(60)
    packed, targets = pack(weight), torch.randint(0, 4001, (300,), generator=torch.Generator().manual_seed(32))
    seeds, is_greedy = torch.arange(300) * 2**40, (torch.arange(300) % 7 == 0).to(torch.uint8)

    def run(rows):
        n = len(rows)
        given = token_logprobs(rows, packed, 4001, targets[:n], temperature[:n], is_dot=profile.is_dot)
        numbers = torch.arange(n)
        draws = numbers, seeds[:n], numbers, numbers % 8, is_greedy[:n]
        token_ids, logprobs = sample(rows, packed, 4001, temperature[:n], *draws, profile.is_dot)
        return torch.stack([given, logprobs, token_ids.float()], dim=1)

    expected, some = run(hidden), slice(None, None, 43)
    reference_logprobs = reference.token_logprobs(
        hidden[some], weight, targets[some], temperature[some], profile.is_dot
    )
    assert_same_bits(expected[some, 0], reference_logprobs)
    set_num_threads(num_threads)
    assert_rows_do_not_depend_on_their_number(run, hidden, expected)


def test_another_order_of_summation_shows_in_the_bits():
    hidden, weight, temperature = make_head(130, seed=3, vocab_size=512)
    block_max, block_sum = vocab_stats(hidden, pack(weight), 512, torch.ones_like(temperature))
    terms = reference.exp(reference.linear(hidden, weight).reshape(130, 8, 64).numpy() - block_max.numpy()[:, :, None])
    left_to_right = np.add.accumulate(terms, axis=2)[:, :, -1]
    assert num_different(block_sum, torch.from_numpy(left_to_right)) > block_sum.numel() // 4


@every_profile
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_draws_equal_the_reference(profile, num_threads):
    set_num_threads(num_threads)
    hidden, weight, temperature = make_head(23, seed=5, dtype=profile.weight_dtype)
    draws = make_draws(400, 23, seed=6 + num_threads)
    tokens, logprobs = sample(hidden, pack(weight), VOCAB, temperature, *draws, profile.is_dot)
    expected_tokens, expected_logprobs = reference.sample(hidden, weight, temperature, *draws, profile.is_dot)
    assert torch.equal(tokens, expected_tokens)
    assert_same_bits(logprobs, expected_logprobs)
    assert len(tokens.unique()) > 100


@every_profile
def test_a_draws_logprob_is_the_trainers(profile):
    hidden, weight, temperature = make_head(23, seed=8, dtype=profile.weight_dtype)
    draws, is_dot = make_draws(500, 23, seed=9), profile.is_dot
    tokens, logprobs = sample(hidden, pack(weight), VOCAB, temperature, *draws, is_dot)
    given = hidden[draws[0]], pack(weight), VOCAB, tokens, temperature[draws[0]]
    assert_same_bits(logprobs, token_logprobs(*given, is_dot=is_dot))
    master = weight.float().requires_grad_()
    assert_same_bits(logprobs, token_logprobs(*given, master, is_dot).detach())


def test_a_draw_does_not_depend_on_its_batch():
    hidden, weight, temperature = make_head(23, seed=10)
    rows, seeds, positions, indices, is_greedy = make_draws(120, 23, seed=11)
    packed = pack(weight)
    tokens, logprobs = sample(hidden, packed, VOCAB, temperature, rows, seeds, positions, indices, is_greedy)
    for i in range(120):  # alone
        own = slice(i, i + 1)
        row = hidden[rows[own]]
        one = sample(
            row, packed, VOCAB, temperature[rows[own]], torch.zeros(1, dtype=torch.int64),
            seeds[own], positions[own], indices[own], is_greedy[own],
        )  # fmt: skip
        assert one[0].item() == tokens[i].item()
        assert_same_bits(one[1], logprobs[own])
    order = torch.randperm(120, generator=torch.Generator().manual_seed(12))
    shuffled = sample(
        hidden,
        packed,
        VOCAB,
        temperature,
        rows[order],
        seeds[order],
        positions[order],
        indices[order],
        is_greedy[order],
    )
    assert torch.equal(shuffled[0], tokens[order])
    assert_same_bits(shuffled[1], logprobs[order])
    wide = torch.full((23, WIDTH + 9), float("nan"))
    wide[:, 3 : 3 + WIDTH] = hidden
    strided = sample(wide[:, 3 : 3 + WIDTH], packed, VOCAB, temperature, rows, seeds, positions, indices, is_greedy)
    assert torch.equal(strided[0], tokens)


def test_seed_position_and_index_each_key_the_draw():
    hidden, weight, _ = make_head(1, seed=13)
    n = 64
    zeros, numbers = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    packed, is_greedy, temperature = pack(weight), torch.zeros(n, dtype=torch.uint8), torch.ones(1)
    for keys in (
        (numbers, zeros, zeros),
        (numbers << 32, zeros, zeros),
        (zeros, numbers, zeros),
        (zeros, zeros, numbers),
    ):
        tokens, _ = sample(hidden, packed, VOCAB, temperature, zeros, *keys, is_greedy)
        assert len(tokens.unique()) > n // 4
    tokens, _ = sample(hidden, packed, VOCAB, temperature, zeros, zeros, zeros, zeros, is_greedy)
    assert len(tokens.unique()) == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("vocab_size", [20, 150])
def test_draws_follow_the_softmax(temperature, vocab_size):
    hidden, weight, _ = make_head(1, seed=14, vocab_size=vocab_size, size=0.02)
    n = 40_000
    zeros = torch.zeros(n, dtype=torch.int64)
    tokens, logprobs = sample(
        hidden, pack(weight), vocab_size, torch.tensor([temperature]), zeros, zeros + 77, torch.arange(n), zeros,
        torch.zeros(n, dtype=torch.uint8),
    )  # fmt: skip
    probabilities = (hidden.double() @ weight.double().T / temperature).softmax(1)[0]
    assert (logprobs.double() - probabilities[tokens].log()).abs().max() < 1e-5
    is_common = probabilities * n > 10
    observed = torch.bincount(tokens, minlength=vocab_size).double()
    observed = torch.cat([observed[is_common], observed[~is_common].sum()[None]])
    expected = torch.cat([probabilities[is_common], probabilities[~is_common].sum()[None]]) * n
    observed, expected = observed[expected > 1e-9], expected[expected > 1e-9]
    assert is_common.sum() > 10
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5 + 10  # beyond it less than once in 10^5


def test_greedy_takes_the_lowest_of_equal_ids():
    hidden, weight, _ = make_head(1, seed=15, vocab_size=300)
    best = int((hidden @ weight.T).argmax())
    zeros, ones = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.uint8)
    for twins in ([best], [7, 9], [9, 70, 299], [63, 64], [128, 299]):
        copies = weight.clone()
        copies[best] = 0.0
        copies[twins] = weight[best]
        tokens, logprobs = sample(hidden, pack(copies), 300, torch.ones(1), zeros, zeros, zeros, zeros, ones)
        assert tokens.tolist() == [min(twins)]
        assert_same_bits(logprobs, token_logprobs(hidden, pack(copies), 300, tokens, torch.ones(1)))


def test_extreme_logits_draw_no_token_without_mass():
    weight = torch.zeros(200, 16)
    weight[:, 0] = torch.linspace(-1, 1, 200) * 3e38  # neighbours lie 3e36 apart
    weight[150, 0] = weight[199, 0]  # these two share the top
    hidden = torch.zeros(3, 16)
    hidden[0, 0], hidden[1, 0] = 1.0, 1e-37  # and a row whose logits are all zero
    temperature, n = torch.tensor([1.0, 0.5, 1.0]), 400
    rows, zeros = torch.arange(n) % 3, torch.zeros(n, dtype=torch.int64)
    draws = (rows, zeros, torch.arange(n), zeros, torch.zeros(n, dtype=torch.uint8))
    tokens, logprobs = sample(hidden, pack(weight), 200, temperature, *draws)
    expected = reference.sample(hidden, weight, temperature, *draws)
    assert torch.equal(tokens, expected[0])
    assert_same_bits(logprobs, expected[1])
    assert set(tokens[rows == 0].tolist()) == {150, 199}
    assert torch.allclose(logprobs[rows == 0], torch.tensor(0.5).log())
    assert torch.allclose(logprobs[rows == 2], torch.tensor(1 / 200).log())
    assert len(set(tokens[rows == 1].tolist())) > 2
    far = token_logprobs(hidden[:1], pack(weight), 200, torch.tensor([0]), torch.ones(1))
    assert far.item() == -torch.inf  # -6e38 is no float32
    certain = token_logprobs(hidden[:1], pack(weight[:140]), 140, torch.tensor([139]), torch.ones(1))
    assert_same_bits(certain, torch.zeros(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_give_nan_and_a_valid_id(bad):
    hidden, weight, temperature = make_head(3, seed=16)
    hidden[1, 5] = bad
    n = 12
    rows, zeros = torch.arange(n) % 3, torch.zeros(n, dtype=torch.int64)
    is_greedy = (torch.arange(n) < 6).to(torch.uint8)
    tokens, logprobs = sample(
        hidden, pack(weight), VOCAB, torch.ones(3), rows, zeros, torch.arange(n), zeros, is_greedy
    )
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    assert torch.equal(logprobs.isnan(), rows == 1)
    trainers = token_logprobs(hidden, pack(weight), VOCAB, torch.tensor([3, 4, 5]), temperature)
    assert trainers.isnan().tolist() == [False, True, False]


@every_profile
@pytest.mark.parametrize("num_rows", [9, 300])  # 300: more than one chunk of rows
def test_gradients_are_those_of_log_softmax(profile, num_rows):
    hidden, weight, temperature = make_head(num_rows, seed=18, dtype=profile.weight_dtype)
    if profile.is_dot:
        hidden = hidden.bfloat16().float()
    temperature = temperature.clamp_min(0.5)
    generator = torch.Generator().manual_seed(19)
    targets, grad = (
        torch.randint(0, VOCAB, (num_rows,), generator=generator),
        torch.randn(num_rows, generator=generator),
    )
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = exact[0] @ exact[1].T / temperature.double()[:, None]
    logits.log_softmax(1).gather(1, targets[:, None])[:, 0].backward(grad.double())
    runs = []
    for num_threads in (1, 3):
        set_num_threads(num_threads)
        inputs = [t.float().clone().requires_grad_() for t in (hidden, weight)]
        logprobs = token_logprobs(inputs[0], pack(weight), VOCAB, targets, temperature, inputs[1], profile.is_dot)
        logprobs.backward(grad)
        runs.append([t.grad for t in inputs])
    for once, again, wanted in zip(*runs, exact):
        assert_close(once, wanted.grad, 3e-3 if profile.is_dot else 1e-5)  # there, gradients of logits are bfloat16
        assert_same_bits(once, again)


def test_gradient_can_be_asked_of_one_input_alone():
    hidden, weight, temperature = make_head(9, seed=20)
    targets = torch.arange(9)
    both = [t.clone().requires_grad_() for t in (hidden, weight)]
    token_logprobs(both[0], pack(weight), VOCAB, targets, temperature, both[1]).sum().backward()
    for first, second in ((True, False), (False, True)):
        inputs = [hidden.clone().requires_grad_(first), weight.clone().requires_grad_(second)]
        token_logprobs(inputs[0], pack(weight), VOCAB, targets, temperature, inputs[1]).sum().backward()
        for one, wanted, is_asked in zip(inputs, both, (first, second)):
            assert is_asked == (one.grad is not None)
            if is_asked:
                assert_same_bits(one.grad, wanted.grad)


def test_mistakes_are_named():
    hidden, weight, temperature = make_head(2, seed=21)
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="temperature is"):
        token_logprobs(hidden, pack(weight), VOCAB, targets, temperature.double())
    with pytest.raises(ValueError, match="hidden is"):
        token_logprobs(hidden.half(), pack(weight), VOCAB, targets, temperature)
    with pytest.raises(ValueError, match="pass master"):
        token_logprobs(hidden.requires_grad_(), pack(weight), VOCAB, targets, temperature)
