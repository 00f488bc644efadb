"""Incremental text equals the tokenizer's own, and stop strings are found wherever tokens happen to end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import Detokenizer

TEXT = "the quick brown fox — naïve café, 12 + 25 = 37\n日本語と 🙂🇫🇷 done. the end, the end"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE (SmolLM2, Llama 3, Qwen): characters beyond ASCII are cut into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox the end"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a leading mark for the space and bytes to fall back on (Llama 2, Mistral)."""
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words += ["▁", "▁the", "▁quick", "▁fox", "the", "end", ",", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert wrapped.decode([vocab["▁the"], vocab["▁fox"]]) == "the fox"
    return wrapped


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


def run(detokenizer: Detokenizer, token_ids: list[int], min_tokens: int = 0) -> tuple[str | None, int]:
    """Appends tokens until a stop string is complete; returns it and how many tokens that took."""
    for num_tokens, token_id in enumerate(token_ids, start=1):
        stop = detokenizer.append(token_id, can_stop=num_tokens >= min_tokens)
        if stop is not None:
            return stop, num_tokens
    return None, len(token_ids)


def test_text_grows_by_whole_characters_and_ends_as_the_tokenizer_decodes_it(byte_level):
    token_ids = byte_level.encode(TEXT)
    detokenizer = Detokenizer(byte_level, byte_level.encode("prompt"))
    for token_id in token_ids:
        before = detokenizer.text
        detokenizer.append(token_id)
        assert detokenizer.text.startswith(before)
        assert TEXT.startswith(detokenizer.text)
    assert detokenizer.finish(token_ids) == TEXT


def test_a_character_is_held_back_until_its_last_byte(byte_level):
    token_ids = byte_level.encode("🙂")
    assert len(token_ids) == 4
    detokenizer = Detokenizer(byte_level, [])
    for token_id in token_ids[:3]:
        detokenizer.append(token_id)
        assert detokenizer.text == ""
    detokenizer.append(token_ids[3])
    assert detokenizer.text == "🙂"


def test_the_space_after_the_prompt_is_kept(sentencepiece):
    vocab = sentencepiece.get_vocab()
    token_ids = [vocab["▁fox"], vocab[","], vocab["▁the"], vocab["▁"], vocab["end"]]
    detokenizer = Detokenizer(sentencepiece, [vocab["<s>"], vocab["▁the"], vocab["▁quick"]])
    for token_id in token_ids:
        detokenizer.append(token_id)
    assert detokenizer.finish(token_ids) == " fox, the end"


def test_special_tokens_are_no_text(tokenizer):
    token_ids = [*tokenizer.encode("the end"), tokenizer.eos_token_id]
    prompt = tokenizer.encode("the fox,")
    expected = tokenizer.decode(prompt + token_ids, skip_special_tokens=True)[len(tokenizer.decode(prompt)) :]
    assert Detokenizer(tokenizer, prompt).finish(token_ids) == expected


def test_a_character_that_never_ends_is_shown_as_broken_at_the_end_only(byte_level):
    token_ids = byte_level.encode("fox 🙂")[:-1]
    detokenizer = Detokenizer(byte_level, [])
    run(detokenizer, token_ids)
    assert detokenizer.text == "fox "
    assert detokenizer.finish(token_ids) == "fox \ufffd"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_give_the_same_text_one_by_one_and_all_at_once(byte_level, sentencepiece, data):
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    # A run of fallback bytes with one broken byte in it decodes to nothing but broken characters, also where a whole
    # one was given before: only bytes that make characters have one text.
    broken = {tokenizer.get_vocab().get(f"<0x{byte:02X}>") for byte in range(0x80, 0x100)}
    ids = st.lists(st.sampled_from([i for i in range(len(tokenizer)) if i not in broken]), max_size=12)
    prompt, token_ids = data.draw(ids), data.draw(ids)
    stepwise = Detokenizer(tokenizer, prompt)
    for token_id in token_ids:
        stepwise.append(token_id)
    num_early = data.draw(st.integers(0, len(token_ids)))
    partly = Detokenizer(tokenizer, prompt)
    for token_id in token_ids[:num_early]:
        partly.append(token_id)
    text = stepwise.finish(token_ids)
    assert text == partly.finish(token_ids)
    assert stepwise.finish(token_ids) == text, "asking again changes nothing"


def test_a_stop_string_is_found_across_token_borders_and_cuts_only_the_text(byte_level):
    token_ids = byte_level.encode("abc") + byte_level.encode("def")
    detokenizer = Detokenizer(byte_level, [], stop=("cde",))
    assert run(detokenizer, token_ids) == ("cde", 5)
    assert detokenizer.finish(token_ids[:5]) == "ab"


def test_a_stop_string_inside_one_token_cuts_the_text_within_it(byte_level):
    token_ids = byte_level.encode(" the")
    assert len(token_ids) == 1
    detokenizer = Detokenizer(byte_level, [], stop=("h",))
    assert run(detokenizer, token_ids) == ("h", 1)
    assert detokenizer.finish(token_ids) == " t"


def test_a_stop_string_beyond_ascii_is_found_when_its_last_byte_comes(byte_level):
    token_ids = byte_level.encode("x🙂y")
    detokenizer = Detokenizer(byte_level, [], stop=["🙂"])
    assert run(detokenizer, token_ids) == ("🙂", 5)
    assert detokenizer.text == "x"


def test_the_stop_string_that_ends_first_wins_whatever_the_order_given(byte_level):
    [token_id] = byte_level.encode(" the")
    for stop in (("the", "h"), ("h", "the")):
        detokenizer = Detokenizer(byte_level, [], stop=stop)
        assert detokenizer.append(token_id) == "h"
    for stop in (("e", "the"), ("the", "e")):
        detokenizer = Detokenizer(byte_level, [], stop=stop)
        assert detokenizer.append(token_id) == "the"
        assert detokenizer.text == " "


def test_the_prompt_is_no_part_of_a_stop_string(byte_level):
    detokenizer = Detokenizer(byte_level, byte_level.encode("ab"), stop=("abc", "b"))
    assert run(detokenizer, byte_level.encode("cabc")) == ("b", 3)


def test_a_stop_string_complete_before_min_tokens_is_plain_text(byte_level):
    token_ids = byte_level.encode("a-b-c-d")
    assert len(token_ids) == 7
    detokenizer = Detokenizer(byte_level, [], stop=("-",))
    assert run(detokenizer, token_ids, min_tokens=3) == ("-", 4)
    assert detokenizer.text == "a-b"
    detokenizer = Detokenizer(byte_level, [], stop=("-b-",))
    assert run(detokenizer, token_ids, min_tokens=4) == ("-b-", 4), "one that is completed later may begin earlier"
