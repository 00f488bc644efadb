"""Environment: the other side of a multi-turn episode, which gives the prompt and answers each turn of the model."""

from __future__ import annotations

import math
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.outputs import FinishReason
from engine.tokenizer import Prompt

Row = Mapping[str, Any]
Content = str | Sequence[int] | Sequence[Mapping[str, object]]
"""Text and token ids are appended as they are; messages as the chat template writes them after the model's turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model said in one turn, as the environment gets it."""

    index: int  # 0 for the first of the episode
    text: str  # without the stop string or end token
    token_ids: list[int]  # as drawn, the stop token included
    finish_reason: FinishReason
    stop_reason: int | str | None
    is_last: bool  # max_turns or max_total_tokens is reached: no other turn can follow, whatever the environment says


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment says to a turn.

    `content` goes into the conversation and the model takes its next turn, unless `is_done`; `reward` adds to the
    episode's. A content that no turn follows is left out of the conversation.
    """

    content: Content | None = None
    reward: float | None = None
    is_done: bool = False

    def __post_init__(self) -> None:
        if self.content is None and not self.is_done:
            raise ValueError("an Observation without content must end the episode: give content, or is_done=True")
        if self.content is not None:
            object.__setattr__(self, "content", _checked_content(self.content))
        if self.reward is not None:
            object.__setattr__(self, "reward", _checked_reward(self.reward))


class Environment(Protocol):
    """One episode's other side. Methods may be coroutine functions; `close()`, where there is one, ends it.

    What raises or runs out of time masks its sample. All randomness should come from `seed`, which is the episode's.
    """

    def reset(self, row: Row, seed: int) -> Prompt | Awaitable[Prompt]:
        """The first prompt (text, token ids or chat messages) for a row of the data set."""
        ...

    def step(self, turn: Turn) -> Observation | Awaitable[Observation]:
        """The answer to a turn. Called after every turn of the model, also the last."""
        ...


EnvironmentFactory = Callable[[], Environment]


def is_messages(content: Content) -> bool:
    """Whether it is a list of chat messages."""
    return not isinstance(content, str) and bool(content) and isinstance(content[0], Mapping)


def _checked_content(content: Any) -> Content:
    if isinstance(content, str):
        return content
    if isinstance(content, bytes | Mapping) or not hasattr(content, "__iter__"):
        raise ValueError(f"content={content!r} of an Observation must be text, token ids, or a list of chat messages")
    items = list(content)
    if items and all(isinstance(item, Mapping) for item in items):
        return [_checked_message(item) for item in items]
    return [_checked_token_id(item) for item in items]


def _checked_message(message: Mapping[str, object]) -> dict[str, object]:
    if "role" not in message or "content" not in message:
        raise ValueError(f"message {message!r} of an Observation must have 'role' and 'content'")
    return dict(message)


def _checked_token_id(item: Any) -> int:
    try:
        token_id = -1 if isinstance(item, bool) else operator.index(item)
    except TypeError:
        token_id = -1
    if token_id < 0:
        raise ValueError(f"{item!r} in an Observation is neither a token id nor, as all would have to be, a message")
    return token_id


def _checked_reward(reward: Any) -> float:
    try:
        number = float(reward)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"reward={reward!r} of an Observation must be a finite number, or None for no judgement")
    return number
