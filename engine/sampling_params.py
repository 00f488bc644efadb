"""Sampling parameters: what a caller may ask of one request, checked the moment it is written down."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import reject_unknown_options

MAX_SEED = 2**64 - 1
GREEDY_TEMPERATURE = 1e-5

# Options of vLLM's that change the distribution sampled from, with the only value this version accepts.
_NEUTRAL_VALUES: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the completions of one prompt are drawn; names and meanings are vLLM's.

    A temperature below 1e-5 is greedy. The sampled token's log-probability always comes. Stop strings and stop
    tokens take effect from `min_tokens` on. Lists are turned into tuples, a single stop string into a tuple of one.

    Raises:
        ValueError: for a value out of range, or one that this version cannot serve.
        TypeError: for an unknown name, with the nearest one and the list of all.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int = 0
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()

    def __new__(cls, **options: Any) -> SamplingParams:
        reject_unknown_options(cls, options)
        return object.__new__(cls)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def logprob_temperature(self) -> float:
        """The temperature that log-probabilities are reported at: 1 where greedy."""
        return 1.0 if self.is_greedy else self.temperature

    def __post_init__(self) -> None:
        self._set(n=_integer("n", self.n, minimum=1))
        self._set(temperature=_temperature(self.temperature))
        self._set(max_tokens=_integer("max_tokens", self.max_tokens, minimum=1))
        self._set(min_tokens=_integer("min_tokens", self.min_tokens, minimum=0))
        self._set(stop=_stop_strings(self.stop), stop_token_ids=_stop_token_ids(self.stop_token_ids))
        self._set(bad_words=_sequence("bad_words", self.bad_words))
        if self.seed is not None:
            self._set(seed=_integer("seed", self.seed, minimum=0, maximum=MAX_SEED))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it or raise max_tokens"
            )
        self._refuse_what_is_not_served()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _refuse_what_is_not_served(self) -> None:
        for name, neutral in _NEUTRAL_VALUES.items():
            value = getattr(self, name)
            if value != neutral:
                raise ValueError(
                    f"{name}={value!r} is not available: this version samples from the full distribution at a "
                    f"temperature; leave {name} at {neutral!r}"
                )
        if self.logprobs != 0 or isinstance(self.logprobs, bool):
            raise ValueError(
                f"logprobs={self.logprobs!r} is not available: this version samples from the full distribution at a "
                "temperature and reports the sampled token's log-probability always; leave logprobs at 0"
            )
        if self.prompt_logprobs is not None:
            raise ValueError(
                f"prompt_logprobs={self.prompt_logprobs!r} is not available: this version samples from the full "
                "distribution at a temperature and reports sampled tokens only; leave prompt_logprobs at None"
            )


def _integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name}={value!r} must be an integer {bounds}")
    return number


def _temperature(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"temperature={value!r} must be a finite number of at least 0 (0 is greedy)")
    return float(value)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name}={value!r} must be a list or a tuple")
    return tuple(value)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _sequence("stop", value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop={value!r} must be one or more strings, none of them empty")
    return strings


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    return tuple(_integer("stop_token_ids", token_id, minimum=0) for token_id in _sequence("stop_token_ids", value))
