from __future__ import annotations

import pytest

from engine import SamplingParams
from rollout import requests


def test_a_groups_seed_depends_on_run_seed_and_group_id_alone():
    seeds = {(run, group): requests.group_seed(run, group) for run in (0, 1, 2**64 - 1) for group in ("g0", "g1", "")}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds.values())
    # these values name rollouts of earlier runs: if they change, no run is reproduced any more
    assert seeds[0, "g0"] == 9656980106419402536
    assert seeds[1, "g0"] == 15699768560540995007


def test_a_seed_of_the_callers_is_kept():
    assert requests.seeded(SamplingParams(seed=5), 1, "g0").seed == 5
    assert requests.seeded(SamplingParams(), 1, "g0").seed == requests.group_seed(1, "g0")


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


def test_params_may_be_one_for_all_or_one_each():
    one, other = SamplingParams(), SamplingParams(n=2)
    assert requests.per_prompt_params(one, 2) == [one, one]
    assert requests.per_prompt_params(None, 1) == [SamplingParams()]
    assert requests.per_prompt_params([one, other], 2) == [one, other]
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        requests.per_prompt_params([one], 2)
    with pytest.raises(ValueError, match=r"params\[1\] must be a SamplingParams, got dict"):
        requests.per_prompt_params([one, {}], 2)


def test_group_ids_are_checked():
    assert requests.per_prompt_group_ids(None, 2) == [None, None]
    assert requests.per_prompt_group_ids(["a", "b"], 2) == ["a", "b"]
    with pytest.raises(ValueError, match="'a' is given 2 times"):
        requests.per_prompt_group_ids(["a", "b", "a"], 3)
    with pytest.raises(ValueError, match="must be a list"):
        requests.per_prompt_group_ids("ab", 2)
