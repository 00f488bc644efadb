"""Sampling parameters: what a caller may ask of one request, checked the moment it is written down."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import reject_unknown_options

MAX_SEED = 2**64 - 1
GREEDY_TEMPERATURE = 1e-5

MAX_LOGPROBS = 20
MAX_PENALTY = 2.0  # of presence and frequency, either way
MAX_REPETITION_PENALTY = 1e6  # and its reciprocal
MAX_LOGIT_BIAS = 100.0  # either way


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the completions of one prompt are drawn; names and meanings are vLLM's.

    A temperature below 1e-5 is greedy, and `min_p`, `top_k` and `top_p` are then off. The sampled token's
    log-probability always comes; `logprobs=k` adds those of the k likeliest. `prompt_logprobs=k` reports on the prompt
    as well, with the model's own log-probabilities at temperature 1; with 0, of its own tokens alone. Stop tokens
    cannot be drawn before `min_tokens`, and stop strings take effect from there on. The repetition penalty counts
    prompt and output, the presence and frequency penalties the output alone. A bad word is barred with and without a
    space before it.
    Lists are turned into tuples, a single stop string into a tuple of one, `logit_bias` into pairs.

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
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
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
        self._set_truncation()
        self._set_penalties()
        if self.seed is not None:
            self._set(seed=_integer("seed", self.seed, minimum=0, maximum=MAX_SEED))
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it or raise max_tokens"
            )

    def _set_truncation(self) -> None:
        self._set(top_p=_number("top_p", self.top_p, 0.0, 1.0, excludes_minimum=True))
        self._set(min_p=_number("min_p", self.min_p, 0.0, 1.0))
        self._set(top_k=max(0, _integer("top_k", self.top_k, minimum=-1)))  # -1 is all too
        self._set(logprobs=_integer("logprobs", self.logprobs, minimum=0, maximum=MAX_LOGPROBS))
        if self.prompt_logprobs is not None:
            number = _integer("prompt_logprobs", self.prompt_logprobs, minimum=0, maximum=MAX_LOGPROBS)
            self._set(prompt_logprobs=number)

    def _set_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(**{name: _number(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)})
        low, high = 1 / MAX_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        self._set(repetition_penalty=_number("repetition_penalty", self.repetition_penalty, low, high))
        self._set(logit_bias=_logit_bias(self.logit_bias), allowed_token_ids=_allowed_token_ids(self.allowed_token_ids))
        self._set(bad_words=_bad_words(self.bad_words))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def _integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    bounds = f"at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name}={value!r} must be an integer {bounds}")
    return number


def _number(name: str, value: Any, minimum: float, maximum: float, excludes_minimum: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum or (excludes_minimum and value == minimum):
        bounds = f"above {minimum:g} and at most" if excludes_minimum else f"from {minimum:g} to"
        raise ValueError(f"{name}={value!r} must be a number {bounds} {maximum:g}")
    return float(value)


def _temperature(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"temperature={value!r} must be a finite number of at least 0 (0 is greedy)")
    return float(value)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name}={value!r} must be a list or a tuple")
    return tuple(value)


def _bad_words(value: Any) -> tuple[str, ...]:
    words = _sequence("bad_words", value)
    for word in words:
        if not isinstance(word, str) or not word.strip(" "):
            raise ValueError(f"bad_words={value!r} must be strings with more than spaces in them")
    return words


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Pairs by ascending id; None for no bias at all."""
    if not value:
        return None
    pairs = value.items() if isinstance(value, Mapping) else _sequence("logit_bias", value)
    bias = {
        _integer("logit_bias", token_id, minimum=0): _number("logit_bias", number, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        for token_id, number in pairs
    }
    return tuple(sorted(bias.items()))


def _allowed_token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    token_ids = {_integer("allowed_token_ids", one, minimum=0) for one in _sequence("allowed_token_ids", value)}
    if not token_ids:
        raise ValueError(f"allowed_token_ids={value!r} allows no token: name at least one, or leave it at None for all")
    return tuple(sorted(token_ids))


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else _sequence("stop", value)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop={value!r} must be one or more strings, none of them empty")
    return strings


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    return tuple(_integer("stop_token_ids", token_id, minimum=0) for token_id in _sequence("stop_token_ids", value))
