"""What SamplingParams accepts, refuses and normalises."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from engine.sampling_params import SamplingParams


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.n, params.temperature, params.max_tokens, params.min_tokens) == (1, 1.0, 16, 0)
    assert (params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (1.0, 0, 0.0, 1.0)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert (params.seed, params.logprobs, params.prompt_logprobs, params.ignore_eos) == (None, 0, None, False)


def test_lists_become_tuples_and_a_single_stop_string_a_tuple_of_one():
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[3, np.int64(4)], bad_words=[])
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (3, 4)
    assert params.bad_words == ()
    assert SamplingParams(stop="\n").stop == ("\n",)


def test_params_are_frozen_hashable_and_survive_copies():
    params = SamplingParams(n=3, stop=["x"], seed=2**64 - 1)
    with pytest.raises(FrozenInstanceError):
        params.n = 4
    assert hash(params) == hash(SamplingParams(n=3, stop="x", seed=2**64 - 1))
    assert pickle.loads(pickle.dumps(params)) == params == copy.deepcopy(params)
    assert replace(params, n=5) == SamplingParams(n=5, stop=["x"], seed=2**64 - 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 7),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("ignore_eos", 1),
        ("bad_words", "abc"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_more_min_tokens_than_max_tokens_is_refused():
    with pytest.raises(ValueError, match="min_tokens=5 is more than max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 0.9),
        ("top_k", 20),
        ("min_p", 0.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {3: 1.0}),
        ("allowed_token_ids", [1, 2]),
        ("bad_words", ["no"]),
        ("prompt_logprobs", 0),
        ("logprobs", 1),
        ("logprobs", None),
    ],
)
def test_an_option_that_is_not_served_is_refused_and_never_ignored(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.*samples from the full distribution at a temperature"):
        SamplingParams(**{name: value})


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"'max_token'.*'max_tokens'"):
        SamplingParams(max_token=3)


def test_integers_are_accepted_where_they_equal_the_neutral_value():
    assert SamplingParams(temperature=0, top_p=1, min_p=0).temperature == 0.0


def test_greedy_reports_at_temperature_one_and_everything_else_at_its_own():
    assert [SamplingParams(temperature=t).is_greedy for t in (0, 9e-6, 1e-5, 0.7)] == [True, True, False, False]
    assert [SamplingParams(temperature=t).logprob_temperature for t in (0, 1e-5, 0.7)] == [1.0, 1e-5, 0.7]
