"""Reference: the policy that a KL holds the trained one to, frozen or following it in steps."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.model import Transformer
from engine.ops import Ops
from trainers.batch import PackedBatch
from trainers.objective_config import ObjectiveConfig
from trainers.policy import Policy, load_transformer, packed_logprobs

REFERENCE_FILE = "reference.safetensors"


class Reference:
    """A copy of the model that the run began with.

    Every update_every optimiser steps it becomes mixup * policy + (1 - mixup) * itself (TR-DPO, arXiv 2404.09656; TRL's
    sync_ref_model); 0 leaves it as it is.
    """

    def __init__(self, model: Transformer, *, update_every: int = 0, mixup: float = 1.0) -> None:
        self.model, self.update_every, self.mixup = model, update_every, mixup

    @classmethod
    def from_config(cls, config: ObjectiveConfig, directory: Path, ops: Ops) -> Reference:
        """The reference of a run on the model in `directory`. ops: the policy's."""
        update_every, mixup = config.reference_update_every, config.reference_mixup
        # Packed bfloat16 would round a mixture anew each time; masters keep it exact, at 4 bytes a weight.
        with_masters = update_every > 0 and mixup < 1 and ops.profile.weight_dtype is not torch.float32
        model = load_transformer(directory, ops, with_masters=with_masters)
        return cls(model, update_every=update_every, mixup=mixup)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Its log-probabilities of the batch's targets, [C] float32 on the CPU."""
        return packed_logprobs(self.model, batch)

    def save(self, directory: Path) -> None:
        """Writes its weights, float32, if they move: else they are those that the run began with."""
        if self.update_every:
            save_file({name: one.contiguous() for name, one in self.model.named_weights()}, directory / REFERENCE_FILE)

    def load(self, directory: Path) -> None:
        """Goes on from what `save` wrote."""
        if self.update_every:
            self.model.load_weights(load_file(directory / REFERENCE_FILE))

    @torch.no_grad()
    def follow(self, policy: Policy) -> None:
        """Moves towards the policy if its optimiser steps have come to a multiple of update_every."""
        if not self.update_every or policy.optimizer.num_updates % self.update_every:
            return
        own = dict(self.model.named_weights()) if self.mixup < 1 else {}
        self.model.load_weights(
            (name, torch.lerp(own[name], weight, self.mixup) if own else weight)
            for name, weight in policy.named_weights()
        )
