from __future__ import annotations

import pytest

from engine import SamplingParams
from engine.prompts import derive_seed
from rollout import requests


def test_a_seed_of_the_callers_is_kept():
    assert requests.seeded(SamplingParams(seed=5), 1, "g0").seed == 5
    assert requests.seeded(SamplingParams(), 1, "g0").seed == derive_seed(1, "g0")


def test_the_prompt_counts_once_and_every_sample_in_full():
    assert requests.token_cost([1, 2, 3], SamplingParams(n=4, max_tokens=10)) == 43


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], r"prompts\[1\].*empty"),
        ([[1] * 8], r"prompts\[0\] has 8 tokens.*max_model_len=8"),
        ([[1], [99]], r"prompts\[1\].*99.*vocabulary"),
        ([[1], 3.5], r"prompts\[1\] must be text, token ids or chat messages, got float"),
        (["text"], r"prompts\[0\].*tokenizer"),
    ],
)
def test_a_bad_prompt_is_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        requests.encode_prompts(None, prompts, vocab_size=50, max_model_len=8)


def test_group_ids_are_checked():
    assert requests.per_prompt_group_ids(None, 2) == [None, None]
    assert requests.per_prompt_group_ids(["a", "b"], 2) == ["a", "b"]
    with pytest.raises(ValueError, match="'a' is given 2 times"):
        requests.per_prompt_group_ids(["a", "b", "a"], 3)
    with pytest.raises(ValueError, match="must be a list"):
        requests.per_prompt_group_ids("ab", 2)
