"""Truncated sampling in slow and plain arithmetic, as kernels/reference.py: `kernels.truncated` equals it bit for bit.

Numpy only spreads one operation over many ids; masses are Python's integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from kernels.reference import VOCAB_BLOCK, drawn_token, exp, log, sum16, uniform
from kernels.truncated import DrawOptions, IdLists, TruncatedDraws

MASS_SCALE = 2.0**44  # the mass of the highest logit

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """The arguments of one draw."""

    row: int
    seed: int
    position: int
    index: int
    is_greedy: bool
    temperature: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    min_p: float
    top_k: int
    top_p: float
    is_plain: bool
    seen: dict[int, int]
    bias: dict[int, float]
    masked: list[int]
    allowed: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """The results of one draw."""

    token_id: int
    logprob: np.float32
    raw_logprob: np.float32
    kept_mass: np.float32
    num_kept: int
    top: list[tuple[int, np.float32]]


def truncated_sample(
    logits_RV: torch.Tensor, draws: torch.Tensor, options: DrawOptions, num_top: int = 0
) -> TruncatedDraws:
    """One draw for each column of `draws`."""
    outcomes = [_draw_one(logits_RV[draw.row].numpy(), draw, num_top) for draw in _columns(draws, options)]
    return TruncatedDraws(
        token_ids=torch.tensor([o.token_id for o in outcomes], dtype=torch.int64),
        logprobs=_floats([o.logprob for o in outcomes]),
        raw_logprobs=_floats([o.raw_logprob for o in outcomes]),
        kept_mass=_floats([o.kept_mass for o in outcomes]),
        num_kept=torch.tensor([o.num_kept for o in outcomes], dtype=torch.int64),
        top_ids=torch.tensor([[i for i, _ in o.top] for o in outcomes], dtype=torch.int64).reshape(-1, num_top),
        top_logprobs=_floats([[value for _, value in o.top] for o in outcomes]).reshape(-1, num_top),
    )


def _draw_one(x: Array, draw: _Draw, num_top: int) -> _Outcome:
    z = _changed(x, draw, draw.masked)
    if np.all(z == -np.inf):
        z = _changed(x, draw, [])
    none = [(-1, np.float32(-np.inf))]
    if np.isnan(z).any() or z.max() in (np.inf, -np.inf):
        nan = np.float32(np.nan)
        raw_logprob = logprobs(x, [0])[0]
        return _Outcome(token_id=0, logprob=nan, raw_logprob=raw_logprob, kept_mass=nan, num_kept=0, top=none * num_top)
    masses = [int(m) for m in np.rint(exp(z - z.max()).astype(np.float64) * MASS_SCALE)]
    order = sorted((i for i in range(len(z)) if z[i] > -np.inf), key=lambda i: (-z[i], i))
    kept = order if draw.is_greedy else _truncated(z, masses, order, draw)
    token_id = _chosen(z, masses, kept, draw)
    kept_z = np.full_like(z, -np.inf)
    kept_z[kept] = z[kept]
    logprob, *top_logprobs = logprobs(kept_z, [token_id, *kept[:num_top]])
    return _Outcome(
        token_id=token_id,
        logprob=logprob,
        raw_logprob=logprobs(x, [token_id])[0],
        kept_mass=np.float32(float(sum(masses[i] for i in kept)) / float(sum(masses))),
        num_kept=len(kept),
        top=([*zip(kept, top_logprobs)] + none * num_top)[:num_top],
    )


def _changed(x: Array, draw: _Draw, masked: list[int]) -> Array:
    """The logits sampled from, before truncation."""
    z = x.copy()
    repetition, presence, frequency = (
        np.float32(p) for p in (draw.repetition_penalty, draw.presence_penalty, draw.frequency_penalty)
    )
    for i, count in draw.seen.items():
        z[i] = z[i] / repetition if z[i] > 0 else z[i] * repetition
        if count > 0:
            z[i] = (z[i] - frequency * np.float32(count)) - presence
    for i, bias in draw.bias.items():
        z[i] = z[i] + np.float32(bias)
    if draw.allowed:
        is_allowed = np.zeros(len(z), dtype=bool)
        is_allowed[draw.allowed] = True
        z[~is_allowed] = -np.inf
    z[masked] = -np.inf
    return z / np.float32(draw.temperature) + np.float32(0.0)


def _truncated(z: Array, masses: list[int], order: list[int], draw: _Draw) -> list[int]:
    """min-p, then top-k, then top-p: each keeps a prefix of `order` (logit descending, id ascending)."""
    kept = order
    if draw.min_p > 0:
        lowest = z.max() + np.float32(log(float(np.float32(draw.min_p))))
        kept = [i for i in kept if z[i] >= lowest]
    if draw.top_k > 0:
        kept = kept[: draw.top_k]
    if draw.top_p < 1:
        mass = sum(masses[i] for i in kept)
        needed = min(max(math.ceil(draw.top_p * float(mass)), 1), mass)
        running = num_kept = 0
        while running < needed:
            running += masses[kept[num_kept]]
            num_kept += 1
        kept = kept[:num_kept]
    return kept


def _chosen(z: Array, masses: list[int], kept: list[int], draw: _Draw) -> int:
    if draw.is_greedy:
        return kept[0]
    u = uniform(draw.seed, draw.position, draw.index)
    return drawn_token(z, *block_sums(z), u) if draw.is_plain else _drawn(masses, kept, u)


def _drawn(masses: list[int], kept: list[int], u: float) -> int:
    target = int(u * 2.0**53) * sum(masses[i] for i in kept) >> 53
    running = 0
    for i in sorted(kept):
        running += masses[i]
        if running > target:
            return i
    raise AssertionError("the target is less than the mass")


def logprobs(z: Array, token_ids: list[int]) -> list[np.float32]:
    """The section "Log-sum-exp" for one row of logits, of which those at -inf count for nothing."""
    top, total = z.max(), 0.0
    if np.isnan(z).any() or top in (np.inf, -np.inf):
        return [np.float32(np.nan)] * len(token_ids)
    highest, sums = block_sums(z)
    for block_sum, factor in zip(sums, exp(highest - top)):
        total += float(block_sum) * float(factor)
    return [(z[token_id] - top) - np.float32(log(total)) for token_id in token_ids]


def block_sums(z: Array) -> tuple[Array, Array]:
    """Maximum and sum of exponentials of each block of 64; -inf and 0 where all of it is at -inf."""
    blocks = np.pad(z, (0, -len(z) % VOCAB_BLOCK), constant_values=-np.inf).reshape(-1, VOCAB_BLOCK)
    highest = blocks.max(axis=1)
    is_empty = highest == -np.inf
    e = exp(blocks - np.where(is_empty, np.float32(0.0), highest)[:, None])
    return highest, sum16((e[:, :16] + e[:, 16:32]) + (e[:, 32:48] + e[:, 48:]))


def _columns(draws: torch.Tensor, options: DrawOptions) -> list[_Draw]:
    return [
        _Draw(
            row=row, seed=seed, position=position, index=index, is_greedy=bool(greedy),
            temperature=numbers[0], repetition_penalty=numbers[1], presence_penalty=numbers[2],
            frequency_penalty=numbers[3], min_p=numbers[4], top_k=int(numbers[5]), top_p=numbers[6],
            is_plain=bool(numbers[7]),
            seen=dict(zip(_list(options.seen, i), _values(options.seen, options.counts, i))),
            bias=dict(zip(_list(options.biased, i), _values(options.biased, options.bias, i))),
            masked=_list(options.masked, i),
            allowed=_list(options.allowed, i),
        )
        for i, ((row, seed, position, index, greedy), numbers) in enumerate(
            zip(draws.T.tolist(), options.numbers.T.tolist())
        )
    ]  # fmt: skip


def _list(lists: IdLists, i: int) -> list[int]:
    return _values(lists, lists.ids, i)


def _values(lists: IdLists, values: torch.Tensor, i: int) -> list:
    return values[lists.offsets[i] : lists.offsets[i + 1]].tolist()


def _floats(values: list) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float32))
