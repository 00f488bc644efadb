from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from trainers import ALGORITHMS, GRPOConfig
from trainers.algorithms import AlgorithmName, algorithm


def test_every_name_has_an_algorithm_with_a_paper():
    assert set(ALGORITHMS) == set(get_args(AlgorithmName))
    for entry in ALGORITHMS.values():
        year_month, number = entry.arxiv.split(".")
        assert year_month.isdigit()
        assert number.isdigit()
        assert entry.title


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_settings_are_fields_of_the_config_and_are_taken(name):
    settings = algorithm(name).settings
    assert settings.keys() <= {field.name for field in dataclasses.fields(GRPOConfig)}
    config = GRPOConfig.for_algorithm(name)
    assert {field: getattr(config, field) for field in settings} == dict(settings)


def test_all_algorithms_settle_the_same_fields():
    assert len({frozenset(entry.settings) for entry in ALGORITHMS.values()}) == 1


def test_no_two_algorithms_are_the_same():
    settings = [tuple(sorted(entry.settings.items())) for entry in ALGORITHMS.values()]
    assert len(set(settings)) == len(settings)


def test_what_the_papers_say():
    def chosen(name: str, *fields: str) -> tuple[object, ...]:
        return tuple(getattr(GRPOConfig.for_algorithm(name), field) for field in fields)

    assert chosen("grpo", "loss_aggregation", "advantage_scale", "clip_low", "clip_high") == (
        "seq-mean-token-mean", "std", 0.2, 0.2,
    )  # fmt: skip
    assert chosen("dr_grpo", "loss_aggregation", "advantage_scale") == ("seq-mean-token-sum-norm", "none")
    assert chosen("dapo", "loss_aggregation", "clip_low", "clip_high") == ("token-mean", 0.2, 0.28)
    assert chosen("gspo", "ratio_level", "clip_low", "clip_high") == ("sequence", 3e-4, 4e-4)
    assert chosen("cispo", "objective", "clip_low") == ("cispo", 1.0)
    assert chosen("rloo", "advantage_baseline", "ratio_level") == ("leave_one_out", "sequence-product")
    assert chosen("reinforce_pp", "advantage_baseline", "whiten_advantages", "kl_in", "kl_estimator") == (
        "none", True, "reward", "k1",
    )  # fmt: skip
    assert chosen("reinforce_pp_baseline", "advantage_baseline", "whiten_advantages", "kl_in", "kl_estimator") == (
        "mean", True, "loss", "k2",
    )  # fmt: skip


def test_overrides_win_and_other_fields_are_free():
    config = GRPOConfig.for_algorithm("dapo", clip_high=0.3, group_size=4, kl_coef=0.1)
    assert (config.clip_high, config.group_size, config.kl_coef) == (0.3, 4, 0.1)
    assert config.loss_aggregation == "token-mean"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"algorithm='ppg' must be one of 'grpo', 'dr_grpo', 'dapo'"):
        GRPOConfig.for_algorithm("ppg")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sapo"}, "objective='sapo' must be one of 'clip', 'cispo', 'reinforce'"),
        ({"loss_aggregation": "mean"}, "loss_aggregation='mean' must be one of"),
        ({"kl_in": "both"}, "kl_in='both' must be one of 'loss', 'reward'"),
        ({"correction": "tis"}, "correction='tis' must be one of"),
        ({"dual_clip": 1.1}, "dual_clip=1.1 must be above 1 [+] clip_high"),
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip belongs to objective='clip'"),
        ({"reference_mixup": 0.0}, "reference_mixup=0.0 must be above 0"),
        ({"reference_update_every": 5}, "reference_update_every=5 needs a kl_coef above 0"),
        ({"correction_high": 0.5}, "correction_high=0.5 must have 1 between them"),
        ({"entropy_coef": -1.0}, "entropy_coef=-1.0 must not be negative"),
        ({"advantage_baseline": "none"}, "set skip_zero_std_groups=False"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)
