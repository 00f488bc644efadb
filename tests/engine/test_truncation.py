"""What a request's rules say for its next token, from its parameters, its tokens and the tokenizer."""

from __future__ import annotations

import pytest

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.truncation import TruncationRules


class WordTokenizer:
    """A token for each letter, space 0; "ab" is one token, and so is " c"."""

    MERGES = (("ab", 50), (" c", 60))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        token_ids = [99] if add_special_tokens else []
        while text:
            merged = next(((piece, one) for piece, one in self.MERGES if text.startswith(piece)), None)
            piece, token_id = merged or (text[0], " abcdefgh".index(text[0]))
            token_ids.append(token_id)
            text = text[len(piece) :]
        return token_ids

    def decode(self, token_ids, **options) -> str:
        return ""


def rules_of(**params) -> TruncationRules | None:
    return TruncationRules.from_params(
        SamplingParams(**params), eos_token_ids=[7], tokenizer=WordTokenizer(), vocab_size=100
    )


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "min_p": 0.1},
        {"min_tokens": 4, "ignore_eos": True},
        {"min_tokens": 4, "ignore_eos": True, "stop_token_ids": [100]},
        {"stop_token_ids": [5]},
    ],
)
def test_requests_with_a_temperature_alone_have_no_rules(params):
    assert rules_of(**params) is None


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.99},
        {"top_k": 1000},
        {"min_p": 0.01},
        {"repetition_penalty": 1.1},
        {"temperature": 0.0, "presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"min_tokens": 1},
        {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": [5]},
    ],
)
def test_each_option_alone_changes_the_distribution(params):
    assert rules_of(**params).changes_distribution
    assert rules_of(logprobs=2, **params).num_top == 2


def test_top_logprobs_alone_change_nothing():
    rules = rules_of(logprobs=3)
    assert (rules.changes_distribution, rules.num_top) == (False, 3)


def test_a_bad_word_is_barred_with_and_without_a_space_before_it():
    assert rules_of(bad_words=["a"]).bad_words == ((1,), (0, 1))
    assert rules_of(bad_words=["c"]).bad_words == ((3,), (60,))
    assert rules_of(bad_words=[" abd"]).bad_words == ((50, 4), (0, 50, 4))


def test_the_last_token_of_a_bad_word_is_masked_once_the_others_are_drawn():
    rules = rules_of(bad_words=["abd", "e"])
    begun = {
        (): [5],
        (4,): [5],
        (50,): [4, 5],
        (50, 4): [5],
        (0, 50): [4, 5],
        (0,): [5],
    }
    for output, masked in begun.items():
        assert rules.masked_ids([9, 9, *output], len(output)).tolist() == masked
    assert rules.masked_ids([9, 50], 0).tolist() == [5], "the prompt does not begin a bad word"


def test_stop_tokens_are_masked_before_min_tokens():
    rules = rules_of(min_tokens=2, stop_token_ids=[9, 3, 2000])
    assert rules.masked_ids([1], 0).tolist() == rules.masked_ids([1, 1], 1).tolist() == [3, 7, 9]
    assert rules.masked_ids([1, 1, 1], 2).tolist() == []
    assert rules_of(min_tokens=2, stop_token_ids=[9], ignore_eos=True).masked_ids([1], 0).tolist() == [9]


def test_seen_tokens_count_the_output_and_remember_the_prompt():
    params = SamplingParams(presence_penalty=0.5, n=2)
    leader = Request.create_group(request_id="r", prompt_token_ids=[5, 8, 5], params=params, seed=0)
    sibling = leader.siblings[0]
    assert [column.tolist() for column in leader.seen_tokens(leader.token_ids)] == [[5, 8], [0, 0]]
    for token_id in (8, 4, 8):
        leader.append_token(token_id, -1.0, 0)
    sibling.append_token(5, -1.0, 0)
    assert [column.tolist() for column in leader.seen_tokens(leader.token_ids)] == [[5, 8, 4], [0, 2, 1]]
    assert [column.tolist() for column in sibling.seen_tokens(sibling.token_ids)] == [[5, 8], [1, 0]]


def test_seen_tokens_are_not_counted_where_no_penalty_asks_for_them():
    request = Request.create_group(request_id="r", prompt_token_ids=[5], params=SamplingParams(top_p=0.5), seed=0)
    assert request.seen_tokens(request.token_ids)[0].size == 0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="need a tokenizer"):
        TruncationRules.from_params(SamplingParams(bad_words=["a"]), vocab_size=100)
    with pytest.raises(ValueError, match=r"allowed_token_ids=\[3, 60\] are all barred by bad_words"):
        rules_of(allowed_token_ids=[3, 60], bad_words=["c"])
    with pytest.raises(ValueError, match="logit_bias names token id 100, outside the vocabulary of 100 tokens"):
        rules_of(logit_bias={100: 1.0})
