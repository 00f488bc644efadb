"""Request: one sample of one prompt, and everything the scheduler knows about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from engine.detokenizer import Detokenizer, Tokenizer
from engine.draw_key import pack_draw_key
from engine.outputs import Completion, FinishReason, TokenDetail
from engine.sampling_params import SamplingParams
from engine.seen_tokens import SeenTokens
from engine.timing import RequestStamps
from engine.truncation import NO_IDS, TruncationRules


class RequestStatus(Enum):
    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()  # waiting again, because the blocks ran out
    FINISHED = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Mutable state of one sample; the scheduler owns it once it is added.

    The samples of one prompt form a group. Its leader (index 0) computes the prompt for all; until then the others
    are the leader's `siblings` and are nowhere else. After the fork every sample is a request of its own.
    """

    request_id: str
    index: int = 0
    prompt_token_ids: list[int] = field(repr=False)
    params: SamplingParams
    seed: int = 0  # 64 bits; the same for all samples of a request, the index tells them apart
    priority: int = 0  # smaller goes first
    cache_salt: str = ""  # requests of different salts share no blocks
    arrival: int = 0  # stamped by the scheduler
    eos_token_ids: frozenset[int] = frozenset()
    detokenizer: Detokenizer | None = field(default=None, repr=False)
    rules: TruncationRules | None = field(default=None, repr=False)
    siblings: tuple[Request, ...] = field(default=(), repr=False)

    token_ids: list[int] = field(init=False, repr=False)  # prompt, then output
    num_prompt_tokens: int = field(init=False)
    draw_key: bytes = field(init=False, repr=False)
    num_computed_tokens: int = 0  # tokens whose keys and values are stored, the step under way included
    num_cached_tokens: int = 0  # of these, not computed for this request but found
    num_pending_tokens: int = 0  # that steps under way draw: they follow token_ids, and nobody knows them yet
    draw_place: int = 0  # among the samples of the last step that draws for it
    block_ids: list[int] = field(default_factory=list, repr=False)
    block_hashes: list[bytes] = field(default_factory=list, repr=False)  # of the full blocks, as far as needed yet
    has_mixed_kv: bool = False  # some keys and values are of older weights
    logprobs: list[float] = field(default_factory=list, repr=False)
    policy_versions: list[int] = field(default_factory=list, repr=False)
    details: list[TokenDetail] = field(default_factory=list, repr=False)  # of every output token where there are rules
    # of the prompt's tokens as far as they are computed, the first having none; None where nobody asks
    prompt_logprobs: list[dict[int, float] | None] | None = field(init=False, repr=False)
    # the model runner's, which may be a step ahead of what the scheduler knows; kept where logits are written out
    drawn_token_ids: list[int] = field(default_factory=list, repr=False)
    seen: SeenTokens = field(init=False, repr=False)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    is_exact: bool = True
    num_preemptions: int = 0
    stamps: RequestStamps = field(default_factory=RequestStamps, repr=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.draw_key = pack_draw_key(self.params, self.seed, self.index, self.rules is not None)
        self.seen = SeenTokens(self.num_prompt_tokens)
        self.prompt_logprobs = None if self.params.prompt_logprobs is None else [None]

    @classmethod
    def create_group(
        cls,
        *,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        seed: int,
        priority: int = 0,
        cache_salt: str = "",
        eos_token_ids: Iterable[int] = (),
        tokenizer: Tokenizer | None = None,
        vocab_size: int = 2**31 - 1,
    ) -> Request:
        """The leader of `params.n` samples of one prompt, with its siblings; see TruncationRules for the errors."""
        prompt = list(prompt_token_ids)
        eos = frozenset(eos_token_ids)
        rules = TruncationRules.from_params(params, eos_token_ids=eos, tokenizer=tokenizer, vocab_size=vocab_size)
        samples = [
            cls(
                request_id=request_id,
                index=index,
                prompt_token_ids=prompt,
                params=params,
                seed=seed,
                priority=priority,
                cache_salt=cache_salt,
                eos_token_ids=eos,
                detokenizer=None if tokenizer is None else Detokenizer(tokenizer, prompt, params.stop),
                rules=rules,
            )
            for index in range(params.n)
        ]
        leader = samples[0]
        leader.siblings = tuple(samples[1:])
        return leader

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """Tokens, pending ones included, whose keys and values are neither stored nor about to be."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def has_started(self) -> bool:
        """Whether it has run before: it has tokens, or had blocks."""
        return self.status is not RequestStatus.WAITING or len(self.token_ids) > self.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def reports_on_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are taken from what it computes.

        They are of the weights that its first token is drawn under: until then, who computes the prompt again, reports
        again.
        """
        return self.prompt_logprobs is not None and len(self.token_ids) == self.num_prompt_tokens

    def ends_with_pending(self, max_model_len: int) -> bool:
        """Whether it has all the tokens it may have once those under way are known."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        return num_tokens - self.num_prompt_tokens >= self.params.max_tokens or num_tokens >= max_model_len

    @property
    def num_seats(self) -> int:
        """Places of max_num_seqs it takes: a leader holds those of its siblings until they are forked."""
        return 1 + len(self.siblings)

    @property
    def order(self) -> tuple[int, int, int]:
        """Place in every queue: priority, then arrival, then sample."""
        return (self.priority, self.arrival, self.index)

    def tokens_before(self, position: int) -> list[int]:
        """Prompt and output up to a position of the completion, as the model runner knows them."""
        drawn = self.drawn_token_ids
        if len(drawn) < position:  # not drawn here but resumed from
            first = self.num_prompt_tokens + len(drawn)
            drawn += self.token_ids[first : self.num_prompt_tokens + position]
        return self.prompt_token_ids + drawn[:position]

    def note_drawn(self, position: int, token_id: int) -> None:
        """The model runner has drawn the token at a position of the completion."""
        self.drawn_token_ids[position:] = [token_id]

    def seen_tokens(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts) for the penalties: tokens of prompt and output, and how often each is in the output.

        token_ids: prompt and output before the token to be drawn, which may be ahead of what the scheduler knows.
        """
        if self.rules is None or not self.rules.has_penalties:
            return NO_IDS, NO_IDS
        return self.seen.read(token_ids)

    def masked_ids(self, token_ids: Sequence[int]) -> np.ndarray:
        """Ids that the token after `token_ids` cannot be."""
        if self.rules is None:
            return NO_IDS
        return self.rules.masked_ids(token_ids, len(token_ids) - self.num_prompt_tokens)

    def forget_pending(self) -> None:
        """The steps under way failed: what they have drawn, if anything, does not count."""
        self.num_pending_tokens = 0
        self.seen = SeenTokens(self.num_prompt_tokens)

    def append_token(
        self, token_id: int, logprob: float, policy_version: int, detail: TokenDetail | None = None
    ) -> None:
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        self.policy_versions.append(policy_version)
        if detail is not None:
            self.details.append(detail)
        if self.has_mixed_kv:
            self.is_exact = False

    def check_stop(self, max_model_len: int) -> bool:
        """Whether the token just appended is the last one; sets finish_reason and stop_reason if so."""
        params = self.params
        token_id = self.token_ids[-1]
        num_output_tokens = len(self.token_ids) - self.num_prompt_tokens
        can_stop = num_output_tokens >= params.min_tokens
        if can_stop and token_id in self.eos_token_ids and not params.ignore_eos:
            return self._finish("stop", None)
        if can_stop and token_id in params.stop_token_ids:
            return self._finish("stop", token_id)
        if params.stop:
            assert self.detokenizer is not None, "stop strings need a detokenizer"
            stop = self.detokenizer.append(token_id, can_stop)
            if stop is not None:
                return self._finish("stop", stop)
        if num_output_tokens >= params.max_tokens or len(self.token_ids) >= max_model_len:
            return self._finish("length", None)
        return False

    def _finish(self, finish_reason: FinishReason, stop_reason: int | str | None) -> bool:
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason
        return True

    def to_completion(self, end: float) -> Completion:
        """The finished sample as the caller sees it; `end` is when it finished, by `time.monotonic`."""
        assert self.finish_reason is not None, f"request {self.request_id!r} is not finished"
        return self._completion(end, self.finish_reason, self._text())

    def to_partial(self, now: float) -> Completion:
        """A copy of what an unfinished sample has so far, to go on from elsewhere; its text is left out."""
        partial = self._completion(now, "abort", text="")
        partial.logprobs, partial.policy_versions = self.logprobs.copy(), self.policy_versions.copy()
        return partial

    def _completion(self, end: float, finish_reason: FinishReason, text: str) -> Completion:
        return Completion(
            request_id=self.request_id,
            index=self.index,
            token_ids=self.output_token_ids,
            logprobs=self.logprobs,
            policy_versions=self.policy_versions,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            text=text,
            is_exact=self.is_exact,
            prompt_logprobs=None if self.prompt_logprobs is None else self.prompt_logprobs.copy(),
            timing=self.stamps.timing(end, self.num_output_tokens),
            **self._detail_columns(),
        )

    def _detail_columns(self) -> dict[str, list[Any]]:
        if self.rules is None:
            return {}
        columns: dict[str, list[Any]] = {}
        if self.rules.changes_distribution:
            columns["raw_logprobs"] = [detail.raw_logprob for detail in self.details]
            columns["kept_mass"] = [detail.kept_mass for detail in self.details]
        if self.rules.num_top:
            columns["top_logprobs"] = [detail.top_logprobs for detail in self.details]
        return columns

    def _text(self) -> str:
        if self.detokenizer is None:
            return ""
        is_stop_token = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        token_ids = self.output_token_ids
        return self.detokenizer.finish(token_ids[:-1] if is_stop_token else token_ids)
