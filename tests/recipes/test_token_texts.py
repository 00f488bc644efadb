from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.token_texts import TokenTexts


@pytest.fixture
def token_texts(tiny_model_dir: Callable[..., Path]) -> TokenTexts:
    return TokenTexts(str(tiny_model_dir()))


def ids_of(token_texts: TokenTexts, text: str) -> list[int]:
    assert token_texts.tokenizer is not None
    return token_texts.tokenizer(text)["input_ids"]


def test_texts_of_tokens_joined_are_the_text(token_texts: TokenTexts):
    text = "the quick fox:\n\n 12 + 30 = 42 <|im_end|>  naïve 日本語 👩‍🚀 </script>\x00"
    texts = token_texts(ids_of(token_texts, text))
    assert texts is not None
    assert "".join(texts) == text
    assert "<|im_end|>" in texts


def test_a_split_character_belongs_to_the_token_that_completes_it(token_texts: TokenTexts):
    assert token_texts(ids_of(token_texts, "x🎉y")) == ["x", "", "", "", "🎉", "y"]


def test_bytes_that_are_no_character_show_as_such(token_texts: TokenTexts):
    ids = ids_of(token_texts, "🎉")
    broken = [*ids[:2], *ids_of(token_texts, "ok"), ids[3]]
    texts = token_texts(broken)
    assert texts is not None
    assert len(texts) == len(broken)
    assert "ok" in "".join(texts)
    assert texts[-1] == "�"


def test_random_tokens_have_one_text_each(token_texts: TokenTexts):
    assert token_texts.tokenizer is not None
    for seed in range(20):
        ids = random.Random(seed).choices(range(len(token_texts.tokenizer)), k=40)
        texts = token_texts(ids)
        assert texts is not None
        assert len(texts) == len(ids)
        whole = token_texts.tokenizer.decode(ids, skip_special_tokens=False)
        assert "".join(texts).replace("�", "") == whole.replace("�", "")


def test_the_tokenizer_is_loaded_when_it_is_needed():
    TokenTexts("/no/such/model")


def test_a_model_without_a_tokenizer_has_no_texts(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(tiny_model_dir() / name)
    assert TokenTexts(str(model))([1, 2]) is None
