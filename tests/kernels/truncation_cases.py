"""Random draws with random options, for the tests of truncated sampling and for the comparison of the builds."""

from __future__ import annotations

import random

import torch

from kernels.truncated import NUMBERS, DrawOptions, IdLists

NEUTRAL = {
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "is_plain": 0,
}


def make_options(num_draws: int, **given) -> DrawOptions:
    """Neutral options but for the given ones: numbers by name, and seen, biased, masked, allowed as a list per draw."""
    values = {name: given.pop(name, NEUTRAL[name]) for name in NUMBERS}
    numbers = [torch.as_tensor(values[name], dtype=torch.float64).expand(num_draws) for name in NUMBERS]
    empty = [{}] * num_draws
    seen, bias = given.pop("seen", empty), given.pop("biased", empty)
    masked, allowed = given.pop("masked", empty), given.pop("allowed", empty)
    assert not given, given
    return DrawOptions(
        numbers=torch.stack(numbers),
        seen=id_lists(seen),
        counts=torch.tensor([count for one in seen for count in one.values()], dtype=torch.int32),
        biased=id_lists(bias),
        bias=torch.tensor([value for one in bias for value in one.values()], dtype=torch.float32),
        masked=id_lists(masked),
        allowed=id_lists(allowed),
    )


def id_lists(lists) -> IdLists:
    offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return IdLists(offsets=offsets, ids=torch.tensor([i for one in lists for i in one], dtype=torch.int32))


def make_draws(num_draws: int, num_rows: int, *, seed: int, greedy_share: float = 0.1) -> torch.Tensor:
    """[5, n]: random rows, 64-bit seeds, positions, indices and greedy flags."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            torch.randint(0, num_rows, (num_draws,), generator=generator),
            torch.randint(-(2**63), 2**63 - 1, (num_draws,), generator=generator),
            torch.randint(0, 3000, (num_draws,), generator=generator),
            torch.randint(0, 16, (num_draws,), generator=generator),
            (torch.rand(num_draws, generator=generator) < greedy_share).to(torch.int64),
        ]
    )


def random_options(num_draws: int, vocab_size: int, *, seed: int) -> DrawOptions:
    """Every option with about even odds of being on, at common and at extreme values."""
    pick = random.Random(seed)

    def numbers(neutral, *values):
        return [pick.choice([neutral] * len(values) + list(values)) for _ in range(num_draws)]

    def lists(make):
        size = max(1, vocab_size // 8)
        ids = [
            pick.sample(range(vocab_size), pick.randint(1, size)) if pick.random() < 0.5 else []
            for _ in range(num_draws)
        ]
        return [{i: make() for i in one} for one in ids]

    return make_options(
        num_draws,
        temperature=numbers(1.0, 0.3, 0.7, 1.5, 20.0, 1e-5),
        repetition_penalty=numbers(1.0, 0.8, 1.1, 1.5),
        presence_penalty=numbers(0.0, 0.5, -2.0),
        frequency_penalty=numbers(0.0, 0.25, -0.5),
        min_p=numbers(0.0, 0.01, 0.1, 1.0, 1e-30),
        top_k=numbers(0, 1, 2, 7, 64, 100, 10**6),
        top_p=numbers(1.0, 0.9, 0.5, 0.999, 1e-9, 1 - 1e-12),
        seen=lists(lambda: pick.randint(0, 4)),
        biased=lists(lambda: pick.uniform(-5, 5)),
        masked=lists(lambda: None),
        allowed=lists(lambda: None),
    )
