"""TokenTexts: what each token of a completion adds to its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no whole character
MAX_TOKENS_PER_CHARACTER = 4  # UTF-8 has at most four bytes a character, and a byte-level token at least one of them
NUM_REMEMBERED = 1 << 16


class TokenTexts:
    """Texts of tokens by the tokenizer of a model, which is loaded when it is first needed."""

    def __init__(self, model: str) -> None:
        self.model = model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, or None where it has none."""
        from engine.checkpoint import resolve_model
        from engine.tokenizer import load_tokenizer

        return load_tokenizer(resolve_model(self.model))

    def __call__(self, token_ids: Sequence[int]) -> list[str] | None:
        """One text per token, which joined are the text of all; None without a tokenizer.

        Special tokens show as they are written. A token that ends inside a character has the text "", and the token
        that completes the character has all of it. Bytes that never become a character show as U+FFFD.
        """
        if self.tokenizer is None:
            return None
        texts = []
        context, start = 0, 0  # tokens from `context` on are decoded, those before `start` only as what went before
        for end in range(1, len(token_ids) + 1):
            before = self._decode(tuple(token_ids[context:start]))
            text = self._decode(tuple(token_ids[context:end]))
            may_go_on = end < len(token_ids) and end - start < MAX_TOKENS_PER_CHARACTER
            if text.endswith(UNFINISHED) and may_go_on:
                texts.append("")
                continue
            texts.append(text[len(before) :])
            context, start = start, end
        return texts

    @cached_property
    def _decode(self) -> Callable[[tuple[int, ...]], str]:
        @lru_cache(NUM_REMEMBERED)
        def decode(token_ids: tuple[int, ...]) -> str:
            # without `clean_up`, which would take spaces away depending on what comes next
            return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        return decode
