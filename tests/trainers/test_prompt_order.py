from __future__ import annotations

import itertools
import random

import pytest

from trainers.prompt_order import PromptOrder


def test_every_pass_has_every_row_once_in_an_order_of_its_own():
    drawn = PromptOrder(18, seed=1).take(54)
    passes = [drawn[start : start + 18] for start in (0, 18, 36)]
    assert all(sorted(each) == list(range(18)) for each in passes)
    assert passes[0] != passes[1] != passes[2]


def test_the_order_is_that_of_shuffled_rows_and_the_seed_fixes_it():
    rows = [f"row {i}" for i in range(100)]
    generator = random.Random(7)
    expected = generator.sample(rows, 100) + generator.sample(rows, 100)
    assert [rows[i] for i in PromptOrder(100, seed=7).take(200)] == expected
    assert [rows[i] for i in PromptOrder(100, seed=8).take(200)] != expected


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 23, 70])
def test_after_a_seek_the_same_rows_come(position):
    whole = PromptOrder(7, seed=3).take(100)
    for order in (PromptOrder(7, seed=3), PromptOrder(7, seed=3)):
        order.take(40)  # seeks go forth and back
        order.seek(position)
        assert order.position == position
        assert order.take(5) + order.take(13) == whole[position : position + 18]
        assert order.position == position + 18


def test_the_position_counts_what_was_handed_out_whichever_way():
    order = PromptOrder(3, seed=0)
    assert list(itertools.islice(order, 4)) == PromptOrder(3, seed=0).take(4)
    assert order.position == 4
    order.index_at(100)
    assert order.position == 4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_rows=0"):
        PromptOrder(0, seed=0)
    with pytest.raises(ValueError, match="position=-1"):
        PromptOrder(3, seed=0).seek(-1)
