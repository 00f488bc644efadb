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
        ("bad_words", [" "]),
        ("bad_words", [7]),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: "1"}),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", None),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", 1.5),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_more_min_tokens_than_max_tokens_is_refused():
    with pytest.raises(ValueError, match="min_tokens=5 is more than max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_an_error_names_value_and_limits():
    with pytest.raises(ValueError, match=r"top_p=1.5 must be a number above 0 and at most 1"):
        SamplingParams(top_p=1.5)
    with pytest.raises(ValueError, match=r"presence_penalty=3 must be a number from -2 to 2"):
        SamplingParams(presence_penalty=3)
    with pytest.raises(ValueError, match=r"logprobs=50 must be an integer from 0 to 20"):
        SamplingParams(logprobs=50)


def test_every_truncation_is_accepted_and_brought_into_one_form():
    params = SamplingParams(
        top_p=0.9, top_k=-1, min_p=0, presence_penalty=1, frequency_penalty=-0.5, repetition_penalty=1.1,
        logit_bias={7: 2, 3: -1.5}, allowed_token_ids=[9, 3, 3], bad_words=["no", " never"], logprobs=20,
    )  # fmt: skip
    assert (params.top_p, params.top_k, params.min_p) == (0.9, 0, 0.0)
    assert params.logit_bias == ((3, -1.5), (7, 2.0))
    assert params.allowed_token_ids == (3, 9)
    assert params.bad_words == ("no", " never")
    assert replace(params, n=2).logit_bias == params.logit_bias
    assert hash(params) == hash(replace(params))
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_an_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"'max_token'.*'max_tokens'"):
        SamplingParams(max_token=3)


def test_integers_are_accepted_where_they_equal_the_neutral_value():
    assert SamplingParams(temperature=0, top_p=1, min_p=0).temperature == 0.0


def test_greedy_reports_at_temperature_one_and_everything_else_at_its_own():
    assert [SamplingParams(temperature=t).is_greedy for t in (0, 9e-6, 1e-5, 0.7)] == [True, True, False, False]
    assert [SamplingParams(temperature=t).logprob_temperature for t in (0, 1e-5, 0.7)] == [1.0, 1e-5, 0.7]
