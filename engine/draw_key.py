"""Draw key: what keys every draw of one sample, packed once, so that a step joins columns instead of building them."""

from __future__ import annotations

import numpy as np

from engine.sampling_params import SamplingParams

DRAW_KEY = np.dtype(
    [
        ("seed", np.int64),  # the 64 bits, signed as int64 tensors hold them
        ("index", np.int64),  # of the sample in its group
        ("is_greedy", np.int64),
        ("temperature", np.float32),  # 1 where greedy
        ("needs_logits", np.int32),
    ]
)


def pack_draw_key(params: SamplingParams, seed: int, index: int, needs_logits: bool) -> bytes:
    """The DRAW_KEY of a sample."""
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    values = (signed_seed, index, params.is_greedy, params.logprob_temperature, needs_logits)
    return np.array(values, DRAW_KEY).tobytes()
