from __future__ import annotations

import math

import pytest

from trainers.schedule import learning_rate_factor


def factors(num: int, **options: object) -> list[float]:
    return [learning_rate_factor(step, **options) for step in range(num)]


def test_the_rate_rises_linearly_and_then_stays():
    assert factors(5, warmup_steps=3) == [1 / 3, 2 / 3, 1.0, 1.0, 1.0]
    assert factors(3) == [1.0, 1.0, 1.0]


def test_a_line_falls_from_the_full_rate_to_nothing_one_past_the_last_step():
    assert factors(6, schedule="linear", num_steps=5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert factors(6, schedule="linear", num_steps=5, warmup_steps=2) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_a_cosine_falls_slowly_fast_and_slowly():
    values = factors(9, schedule="cosine", num_steps=8)
    assert values == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)])
    assert values[4] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_falls_is_never_negative_and_never_rises_after_warm_up(schedule):
    for warmup_steps in (0, 1, 4, 10, 20):
        values = factors(30, schedule=schedule, num_steps=10, warmup_steps=warmup_steps)
        peak = max(warmup_steps - 1, 0)
        assert values[peak] == 1.0
        assert values[peak:] == sorted(values[peak:], reverse=True)
        assert all(0.0 < value <= 1.0 for value in values[:10])
        assert set(values[max(10, peak + 1) :]) <= {0.0}


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="learning_rate_schedule='step' must be one of 'constant', 'linear', 'cosine'"):
        learning_rate_factor(0, schedule="step")
    with pytest.raises(ValueError, match="'cosine' needs the number of optimiser steps"):
        learning_rate_factor(0, schedule="cosine")
