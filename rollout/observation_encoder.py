"""Observation encoder: token ids of what an environment says, to be appended to the very tokens the model drew.

A chat template writes whole conversations. What it writes after an assistant's words is found by rendering a
conversation in which a marker stands for them, and cutting after the marker: the tail closes the assistant's turn,
holds the new messages, and opens the next turn. That is right only if the template leaves what stands before the
marker alone, which is checked when the encoder is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rollout.environment import Content, is_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, object]]

_MARKER = "(the assistant speaks)"
_USER: Messages = ({"role": "user", "content": "Hello."},)
_SYSTEM: Messages = ({"role": "system", "content": "Be brief."},)
_ASSISTANT: Messages = ({"role": "assistant", "content": "Yes?"},)
_WAY_OUT = "let the environment answer with text or token ids, which are appended as they are"


class ObservationEncoder:
    """Encodes observations for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.template_problem = self._find_template_problem()  # why messages cannot be observations; None if they can

    def check(self, content: Content) -> None:
        """ValueError if contents of this kind cannot be encoded with this tokenizer at all."""
        if is_messages(content) and self.template_problem is not None:
            raise ValueError(f"observations cannot be chat messages: {self.template_problem}; {_WAY_OUT}")
        if isinstance(content, str) and self.tokenizer is None:
            raise ValueError("this model directory has no tokenizer: let the environment answer with token ids")

    def encode(self, content: Content, last_token_id: int | None) -> list[int]:
        """Token ids of an observation that follows `last_token_id`, the last one drawn.

        Messages begin with the token that ends the assistant's turn, unless the model drew it itself: a turn that ran
        into its length or a stop string is closed so. ValueError for ids outside the vocabulary and for messages that
        the template refuses.
        """
        if isinstance(content, str):
            return self._encode_text(content)
        if is_messages(content):
            token_ids = self._encode_text(self._tail(_USER, content))
            return token_ids[1:] if token_ids[0] == last_token_id else token_ids
        return self._checked_ids(content)

    def decode(self, token_ids: Sequence[int]) -> str:
        """For people to read: special tokens are left out, and what comes back is never encoded again."""
        return "" if self.tokenizer is None else self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def _encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        for token_id in token_ids:
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"token id {token_id} in an observation is outside the vocabulary of {self.vocab_size} tokens"
                )
        return list(token_ids)

    def _tail(self, before: Messages, messages: Messages) -> str:
        """What the template writes after the words of an assistant that answers `before` and hears `messages`."""
        marked = {"role": "assistant", "content": _MARKER}
        head, whole = self._render(before), self._render([*before, marked, *messages])
        if not whole.startswith(head + _MARKER):
            raise ValueError(
                "the chat template rewrites earlier turns: before the assistant's words it writes "
                f"{head!r} at first, and later {whole.partition(_MARKER)[0]!r}"
            )
        return whole.removeprefix(head + _MARKER)

    def _render(self, messages: Messages) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    # --- whether the template can be cut ---

    def _find_template_problem(self) -> str | None:
        if self.tokenizer is None or not self.tokenizer.chat_template:
            return "this model has no chat template"
        try:
            tails = [self._tail(before, _USER) for before in self._contexts()]
        except ValueError as error:
            return str(error)
        if len(set(tails)) > 1:
            return f"what the chat template writes after a turn depends on the turns before it: {sorted(set(tails))}"
        return self._find_boundary_problem(tails[0])

    def _contexts(self) -> list[Messages]:
        """Conversations that must all be cut alike: without and with a system message, short and longer."""
        contexts = [_USER, (*_USER, *_ASSISTANT, *_USER)]
        try:
            self._render([*_SYSTEM, *_USER])
        except ValueError:  # a template without system messages
            return contexts
        return [*contexts, (*_SYSTEM, *_USER)]

    def _find_boundary_problem(self, tail: str) -> str | None:
        """Tokens must begin where the assistant's words end, or the model would have read other ones in training."""
        tail_ids = self._encode_text(tail)
        whole_ids = self._encode_text(self._render(_USER) + _MARKER + tail)
        if not tail_ids or tail_ids[0] not in self._special_ids() or whole_ids[-len(tail_ids) :] != tail_ids:
            return f"the chat template ends a turn with {tail[:20]!r}, which does not begin with a special token"
        return None

    def _special_ids(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {})}
