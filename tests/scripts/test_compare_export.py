from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.compare_export import Options, Sample, compare, first_difference, main


def sample(token_ids: list[int], other: int, behind: float) -> Sample:
    """Whose tokens are each `behind` nats likelier than one other."""
    tops = [{token_id: -0.5, other: -0.5 - behind} for token_id in token_ids]
    return Sample(token_ids=token_ids, logprobs=[-0.5] * len(token_ids), top_logprobs=tops)


def test_the_first_difference_may_be_an_end():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("theirs", "is_good", "num_tokens"),
    [([1, 2, 3], True, 3), ([1, 9, 7], True, 1), ([1, 8, 3], False, 1), ([1, 2], False, 2)],
)
def test_only_a_near_tie_may_go_another_way(theirs: list[int], is_good: bool, num_tokens: int):
    agreement = compare("reader", [sample([1, 2, 3], other=9, behind=0.001)], [theirs])
    assert (agreement.is_good, agreement.num_tokens) == (is_good, num_tokens)
    assert not compare("reader", [sample([1, 2, 3], other=9, behind=0.1)], [[1, 9, 7]]).is_good


@pytest.mark.slow
def test_transformers_writes_what_the_engine_writes(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    main(Options(model=str(tiny_model_dir("llama")), num_prompts=4, max_tokens=8, output=tmp_path / "export.json"))
    [figures] = json.loads((tmp_path / "export.json").read_text())["readers"]
    assert figures["reader"] == "transformers"
    assert figures["num_samples"] == 4
    assert figures["num_tokens"] > 8
