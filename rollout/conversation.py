"""Conversation: an episode's token ids as they grow, turn by turn, with what each of them is to a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.rollout import Rollout


@dataclass(slots=True, kw_only=True)
class Conversation:
    """The first prompt, and after it completions and observations in turn; nothing is ever taken back or made anew.

    An observation's tokens have loss_mask 0, logprob 0.0, and the policy version of the token before them.
    """

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    turns: list[Rollout] = field(default_factory=list)
    turn_spans: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of each turn in token_ids
    details: dict[str, list[Any]] = field(default_factory=dict)  # raw_logprobs, kept_mass, top_logprobs where asked for

    @property
    def next_prompt(self) -> list[int]:
        """What the model reads before its next turn."""
        return self.prompt_token_ids + self.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.token_ids)

    def add_turn(self, turn: Rollout) -> None:
        """Append what the model drew after `next_prompt`."""
        start = len(self.token_ids)
        self._append(turn.token_ids, turn.logprobs, turn.policy_versions, loss=1)
        self.turn_spans.append((start, len(self.token_ids)))
        self.turns.append(turn)
        self._extend_details({name: getattr(turn, name) for name in _OBSERVED_DETAILS})

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Append what the environment answered to the latest turn."""
        count, version = len(token_ids), self.policy_versions[-1]
        self._append(token_ids, [0.0] * count, [version] * count, loss=0)
        self._extend_details({name: [_OBSERVED_DETAILS[name]() for _ in token_ids] for name in self.details})

    def _append(
        self, token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int], *, loss: int
    ) -> None:
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.policy_versions.extend(versions)
        self.loss_mask.extend([loss] * len(token_ids))

    def _extend_details(self, details: Mapping[str, list[Any] | None]) -> None:
        for name, values in details.items():
            if values is not None:
                self.details.setdefault(name, []).extend(values)


# What a token that nobody drew has in the lists that only some sampling parameters ask for.
_OBSERVED_DETAILS: dict[str, Callable[[], Any]] = {
    "raw_logprobs": float,
    "kept_mass": lambda: 1.0,
    "top_logprobs": dict,
}
