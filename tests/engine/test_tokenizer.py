"""Tokenizer: prompts of every kind become token ids, and what is no prompt is refused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.tokenizer import check_foreign_kernels, encode, load_tokenizer

MESSAGES = [{"role": "user", "content": "what is 1 + 2?"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return load_tokenizer(tiny_model_dir())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_text_round_trips_with_single_digits_and_newlines(tiny_model_dir, family):
    tokenizer = load_tokenizer(tiny_model_dir(family))
    text = "12 + 25 = 37\nthe  quick é fox\n\n"
    token_ids = encode(tokenizer, text)
    assert tokenizer.decode(token_ids) == text
    assert [tokenizer.decode([token_id]) for token_id in encode(tokenizer, "12")] == ["1", "2"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_it_is_the_one_that_transformers_finds(tiny_model_dir, family):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(tiny_model_dir(family)), AutoTokenizer.from_pretrained(str(tiny_model_dir(family)))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template


def test_token_ids_are_taken_as_they_are(tokenizer):
    assert encode(tokenizer, [5, 4, 3]) == [5, 4, 3]
    assert encode(None, (5, 4, 3)) == [5, 4, 3]
    taken = encode(tokenizer, np.array([5, 4], dtype=np.int32))
    assert taken == [5, 4]
    assert all(type(token_id) is int for token_id in taken)


def test_chat_messages_go_through_the_template_up_to_the_answer(tokenizer):
    token_ids = encode(tokenizer, MESSAGES)
    assert tokenizer.decode(token_ids) == "<|im_start|>user\nwhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids[0] == 1, "special tokens of the template are single ids"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([3, -1], "-1 in a prompt is negative"),
        ([3, 320], "320 in a prompt is outside the vocabulary of 320"),
        ([3, 2**70], "outside the vocabulary"),
        ([3, 1.5], "1.5"),
        ([3, "x"], "'x'"),
        ([True], "True"),
        (["text"], "'text'"),
        ([{"role": "user"}], "'role' and 'content'"),
        ([{"role": "user", "content": "x"}, 3], "neither"),
        ({"role": "user", "content": "x"}, "list of chat messages"),
        (b"text", "must be text"),
    ],
)
def test_what_is_no_prompt_is_refused(tokenizer, prompt, words):
    with pytest.raises(ValueError, match=words):
        encode(tokenizer, prompt)


def test_the_models_vocabulary_is_the_limit_where_it_is_given(tokenizer):
    assert encode(tokenizer, [321], vocab_size=384) == [321]
    with pytest.raises(ValueError, match="outside the vocabulary of 10"):
        encode(tokenizer, "the", vocab_size=10)


def test_without_a_tokenizer_only_ids_are_prompts(tmp_path):
    assert load_tokenizer(tmp_path) is None
    for prompt in ("text", MESSAGES):
        with pytest.raises(ValueError, match="give"):
            encode(None, prompt)


def test_a_chat_without_or_against_the_template_is_a_users_mistake(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        encode(tokenizer, MESSAGES)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode(tokenizer, MESSAGES)


def test_a_foreign_kernels_distribution_is_named_before_it_breaks_transformers(tiny_model_dir, tmp_path, monkeypatch):
    check_foreign_kernels()
    (tmp_path / "kernels-0.18.5.dist-info").mkdir()
    (tmp_path / "kernels-0.18.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"'kernels' 0\.18\.5 is installed at .*pip uninstall kernels"):
        check_foreign_kernels()
    with pytest.raises(RuntimeError, match="pip uninstall kernels"):
        load_tokenizer(tiny_model_dir())


@pytest.mark.slow
def test_the_real_models_is_the_one_that_transformers_finds(smollm2_dir):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(smollm2_dir), AutoTokenizer.from_pretrained(str(smollm2_dir))
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template
