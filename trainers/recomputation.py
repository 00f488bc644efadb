"""Recomputation: decoder layers that keep only their inputs for the backward pass (gradient checkpointing)."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from engine.model import DecoderLayer


class RecomputedLayer(DecoderLayer):
    """A DecoderLayer that computes its forward again in the backward pass (arXiv 1604.06174).

    Its parameters have the same names. The kernels give the same bits the second time, so neither log-probabilities
    nor gradients change; a step takes one forward more.
    """

    def forward(self, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        # nothing is drawn at random in a layer, so there is no state of a generator to bring back
        return checkpoint(super().forward, *inputs, use_reentrant=False, preserve_rng_state=False)
