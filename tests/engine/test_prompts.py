from __future__ import annotations

import pytest

from engine import SamplingParams
from engine.prompts import as_prompts, derive_seed, per_prompt_params


def test_a_seed_depends_on_run_seed_and_request_id_alone():
    seeds = {(run, group): derive_seed(run, group) for run in (0, 1, 2**64 - 1) for group in ("g0", "g1", "")}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds.values())
    # these values name rollouts of earlier runs: if they change, no run is reproduced any more
    assert seeds[0, "g0"] == 9656980106419402536
    assert seeds[1, "g0"] == 15699768560540995007


def test_params_may_be_one_for_all_or_one_each():
    one, other = SamplingParams(), SamplingParams(n=2)
    assert per_prompt_params(one, 2) == [one, one]
    assert per_prompt_params(None, 1) == [SamplingParams()]
    assert per_prompt_params([one, other], 2) == [one, other]
    with pytest.raises(ValueError, match="params has 1 entries for 2 prompts"):
        per_prompt_params([one], 2)
    with pytest.raises(ValueError, match=r"params\[1\] must be a SamplingParams, got dict"):
        per_prompt_params([one, {}], 2)


def test_one_prompt_of_any_kind_is_a_list_of_one():
    message = {"role": "user", "content": "what is it?"}
    for prompt in ("text", [5, 6], [message]):
        assert as_prompts(prompt) == [prompt]
    assert as_prompts(["text", [5, 6], [message]]) == ["text", [5, 6], [message]]
    with pytest.raises(ValueError, match="empty"):
        as_prompts([])
