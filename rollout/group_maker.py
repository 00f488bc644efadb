"""GroupMaker: turns a caller's prompts into groups to submit, once all that is wrong with them has been found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine import SamplingParams
from engine.prompts import as_prompts, per_prompt_params
from engine.tokenizer import Prompt
from rollout import requests
from rollout.requests import GroupRequest
from rollout.submission import PendingGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMaker:
    """Its methods return the names that were reserved for a call and the groups, which are made as they are asked for.

    They raise ValueError for the caller's mistakes, before anything is sent; a prompt of an iterator is looked at when
    its turn comes.
    """

    tokenizer: Any  # None where the model has none
    seed: int  # of the run
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    kernel_fingerprint: str
    reserve: Callable[[Sequence[str | None]], list[str]]  # names for groups, made up for None

    def of_list(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        group_ids: Sequence[str] | None,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[str], Iterator[PendingGroup]]:
        encoded = [np.array(self._encode(place, prompt), np.int32) for place, prompt in enumerate(as_prompts(prompts))]
        all_params = per_prompt_params(params, len(encoded))
        all_metadata = requests.per_prompt_metadata(metadata, len(encoded))
        for one in set(all_params):
            self._check_num_samples(one)
        reserved = self.reserve(requests.per_prompt_group_ids(group_ids, len(encoded)))
        columns = zip(itertools.count(), reserved, encoded, all_params, all_metadata)
        return reserved, (
            self._group(place, group_id, token_ids.tolist(), one, row)
            for place, group_id, token_ids, one, row in columns
        )

    def of_iterator(
        self,
        prompts: Iterator[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        group_ids: Sequence[str] | None,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[str], Iterator[PendingGroup]]:
        if group_ids is not None or metadata is not None or isinstance(params, Sequence):
            raise ValueError(
                "an iterator of prompts takes one params for all, and neither group_ids nor metadata: give a list"
            )
        one = params or SamplingParams()
        self._check_num_samples(one)
        reserved = self.reserve([None])
        return reserved, (
            self._group(place, f"{reserved[0]}/{place}", self._encode(place, prompt), one, {})
            for place, prompt in enumerate(prompts)
        )

    def _encode(self, place: int, prompt: Prompt) -> list[int]:
        return requests.encode_prompt(self.tokenizer, place, prompt, self.vocab_size, self.max_model_len)

    def _check_num_samples(self, params: SamplingParams) -> None:
        if params.n > self.max_num_seqs:
            raise ValueError(
                f"n={params.n} samples are more than an engine's max_num_seqs={self.max_num_seqs}: lower n, or raise "
                "max_num_seqs"
            )

    def _group(
        self,
        place: int,
        group_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        metadata: Mapping[str, Any],
    ) -> PendingGroup:
        request = GroupRequest(
            group_id=group_id,
            prompt_token_ids=prompt_token_ids,
            params=requests.seeded(params, self.seed, group_id),
        )
        return PendingGroup(
            position=place,
            request=request,
            sampling_params=params,
            metadata=metadata,
            kernel_fingerprint=self.kernel_fingerprint,
        )
