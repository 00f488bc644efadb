"""Draw key: what keys every draw of one sample, packed once, so that a step joins columns instead of building them."""

from __future__ import annotations

import numpy as np

from engine.sampling_params import SamplingParams
from engine.truncation import TruncationRules

DRAW_KEY = np.dtype(
    [
        ("seed", np.int64),  # the 64 bits, signed as int64 tensors hold them
        ("index", np.int64),  # of the sample in its group
        ("is_greedy", np.int64),
        ("temperature", np.float32),  # 1 where greedy
        ("road", np.int32),
    ]
)

PLAIN_ROAD, PLAIN_ROAD_AND_LOGITS, LOGITS_ROAD = range(3)


def pack_draw_key(params: SamplingParams, rules: TruncationRules | None, seed: int, index: int) -> bytes:
    """The DRAW_KEY of a sample."""
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    return np.array(
        (signed_seed, index, params.is_greedy, params.logprob_temperature, _road(rules)), DRAW_KEY
    ).tobytes()


def _road(rules: TruncationRules | None) -> int:
    """Where a sample is drawn, and whether its logits are written out."""
    if rules is None:
        return PLAIN_ROAD
    return LOGITS_ROAD if rules.changes_distribution else PLAIN_ROAD_AND_LOGITS
