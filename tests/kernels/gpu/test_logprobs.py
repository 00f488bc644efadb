from __future__ import annotations

import pytest
import torch
from gpu_checks import assert_near, on_device, rounded_spread
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.gpu.logprobs import sample, token_logprobs, vocab_stats

VOCAB = 200  # three blocks of 64 and a shorter one


def operands(num_rows: int, width: int = 72, dtype: torch.dtype = torch.float32, seed: int = 1):
    hidden = rounded_spread(num_rows, width, seed=seed, dtype=dtype, low=-2, high=2)
    weight = rounded_spread(VOCAB, width, seed=seed + 1, dtype=dtype, low=-4, high=0)
    temperature = torch.tensor([1.0, 0.7, 2.0, 1.0, 30.0]).repeat(num_rows // 5 + 1)[:num_rows]
    return hidden, weight, temperature


def placed(hidden, weight, temperature, dtype=torch.float32):
    return on_device(hidden, dtype), on_device(weight, dtype), on_device(temperature)


def draws(num_draws: int, num_rows: int, *, greedy: bool = False):
    number = torch.arange(num_draws)
    is_greedy = torch.full((num_draws,), int(greedy), dtype=torch.uint8)
    return number % num_rows, (number - 7) << 40, number * 3, number // 20, is_greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_sums_and_logprobs_are_near_the_reference(dtype):
    hidden, weight, temperature = operands(70, dtype=dtype)
    targets = torch.arange(70) * 29 % VOCAB
    on_gpu = placed(hidden, weight, temperature, dtype)
    for actual, exact in zip(vocab_stats(*on_gpu), reference.vocab_stats(hidden, weight, temperature)):
        assert_near(actual, exact, 5e-6)
    logprobs = token_logprobs(*on_gpu[:2], on_device(targets), on_gpu[2])
    assert_near(logprobs, reference.token_logprobs(hidden, weight, targets, temperature), 1e-6)


def test_draws_are_those_of_the_reference():
    hidden, weight, temperature = operands(5)
    entries = draws(25, 5)
    token_ids, logprobs = sample(*placed(hidden, weight, temperature), *map(on_device, entries))
    expected_ids, expected_logprobs = reference.sample(hidden, weight, temperature, *entries)
    assert token_ids.tolist() == expected_ids.tolist()
    assert len(set(token_ids.tolist())) > 8
    assert_near(logprobs, expected_logprobs, 1e-6)


def test_greedy_takes_the_lowest_of_the_likeliest_ids():
    hidden, weight, _ = operands(3)
    weight[[5, 70, 150]] = 8 * hidden[0]  # the largest logit of row 0, three times over
    entries = draws(3, 3, greedy=True)
    token_ids, _ = sample(*placed(hidden, weight, torch.ones(3)), *map(on_device, entries))
    assert token_ids[0] == 5
    assert token_ids.tolist() == reference.sample(hidden, weight, torch.ones(3), *entries)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drawn_tokens_logprob_is_what_the_trainer_computes(dtype):
    hidden, weight, temperature = placed(*operands(70, dtype=dtype, seed=5), dtype)
    entries = [on_device(x) for x in draws(12, 70)]
    token_ids, logprobs = sample(hidden, weight, temperature, *entries)
    rows = entries[0]
    trained = token_logprobs(hidden[rows], weight, token_ids, temperature[rows])
    assert_same_bits(trained, logprobs)


def test_draws_do_not_depend_on_the_batch():
    hidden, weight, temperature = placed(*operands(5))
    entries = [on_device(x) for x in draws(12, 5)]
    together = sample(hidden, weight, temperature, *entries)
    for draw in (0, 11):
        row, *rest = (x[draw : draw + 1] for x in entries)
        alone = sample(hidden[row], weight, temperature[row], row * 0, *rest)
        for one, many in zip(alone, together):
            assert_same_bits(one, many[draw : draw + 1])


def test_an_infinite_sum_gives_nan_and_an_id():
    hidden, weight, temperature = operands(1)
    weight[3] = float("nan")
    token_ids, logprobs = sample(*placed(hidden, weight, temperature), *map(on_device, draws(1, 1)))
    assert 0 <= token_ids.item() < VOCAB
    assert logprobs.isnan().all()


def test_gradients_are_those_of_log_softmax():
    hidden, weight, temperature = operands(9)
    targets = torch.arange(9) * 17 % VOCAB
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    slopes = torch.arange(9) - 4.0
    exact = torch.log_softmax(x @ w.T / temperature[:, None], dim=1).gather(1, targets[:, None])[:, 0]
    (exact * slopes).sum().backward()

    on_gpu = placed(hidden, weight, temperature)
    h, master = on_gpu[0].requires_grad_(), on_gpu[1].clone().requires_grad_()
    logprobs = token_logprobs(h, on_gpu[1], on_device(targets), on_gpu[2], master)
    (logprobs * on_device(slopes)).sum().backward()
    assert_near(h.grad, x.grad, 1e-5)
    assert_near(master.grad, w.grad, 1e-5)
