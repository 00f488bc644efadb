"""Detokenizer: turns one sample's tokens into text as they come, and finds stop strings across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Prompt tokens decoded along with the first output token, so that a leading space survives and a character begun
# by the prompt is not shown as a broken one.
NUM_CONTEXT_TOKENS = 5

_REPLACEMENT_CHARACTER = "\ufffd"


class Tokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


class Detokenizer:
    """Incremental text of one sample.

    What a token adds depends on its neighbours, so each step decodes a short window twice, without and with what is
    new, and takes the difference (the prefix-offset method of text-generation-inference and vLLM). Text that ends in
    the middle of a character is held back until the character is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids = list(prompt_token_ids[-NUM_CONTEXT_TOKENS:])  # window: context, then every output token
        self._num_context_tokens = len(self._token_ids)
        self._prefix_offset = 0  # _token_ids[_prefix_offset:_read_offset] is text already given, kept as context
        self._read_offset = len(self._token_ids)
        self._prefix_text = self._decode(0)
        self._is_cut = False

    def append(self, token_id: int, can_stop: bool = True) -> str | None:
        """Takes the next output token; returns the stop string that it completes, if any, and cuts `text` there.

        With `can_stop` False (fewer than min_tokens so far) a stop string completed here is plain text.
        """
        self._token_ids.append(token_id)
        num_old_characters = len(self.text)
        self._read(is_last=False)
        if not can_stop or len(self.text) == num_old_characters:
            return None
        return self._cut_at_stop(num_old_characters)

    def finish(self, token_ids: Sequence[int]) -> str:
        """The whole text of `token_ids`, the output tokens that count as text; those already appended come first."""
        if not self._is_cut:
            num_appended = len(self._token_ids) - self._num_context_tokens
            self._token_ids.extend(token_ids[num_appended:])
            self._read(is_last=True)
        return self.text

    def _read(self, is_last: bool) -> None:
        text = self._decode(self._prefix_offset)
        if len(text) <= len(self._prefix_text) or (text.endswith(_REPLACEMENT_CHARACTER) and not is_last):
            return
        self.text += text[len(self._prefix_text) :]
        self._prefix_offset = self._read_offset
        self._read_offset = len(self._token_ids)
        self._prefix_text = self._decode(self._prefix_offset)

    def _decode(self, start: int) -> str:
        return self._tokenizer.decode(
            self._token_ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _cut_at_stop(self, num_old_characters: int) -> str | None:
        """Of the stop strings that end in the new text, the one that ends first; of those the longest."""
        found: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = self.text.find(stop, max(0, num_old_characters - len(stop) + 1))
            if start >= 0:
                candidate = (start + len(stop), start, stop)
                found = candidate if found is None else min(found, candidate)
        if found is None:
            return None
        self.text = self.text[: found[1]]
        self._is_cut = True
        return found[2]
