"""Critic: PPO's value function - a Transformer of its own with a value head, its optimiser and its updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint import resolve_model
from engine.computation import Device, Numerics
from engine.model import NamedTensors, PackedLinear, Transformer
from engine.ops import make_ops
from trainers.batch import PackedBatch
from trainers.losses import LossOutput, value_loss
from trainers.optimizer import MasterOptimizer
from trainers.policy import load_transformer, packed_hidden, safetensors_errors
from trainers.ranks import ONLY_RANK, NamedTensor, Ranks
from trainers.schedule import LearningRateSchedule

HEAD_WEIGHT, HEAD_BIAS = "score.weight", "score.bias"
WEIGHTS_FILE, OPTIMIZER_FILE = "critic.safetensors", "critic_optimizer.safetensors"  # of a checkpoint


class ValueModel(nn.Module):
    """A Transformer whose final hidden states a head [1, D] turns into values; the head begins at zero."""

    def __init__(self, trunk: Transformer) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = PackedLinear(
            1, trunk.config.hidden_size, trunk.ops, has_bias=True, with_master=True, into_residual=True
        )
        nn.init.zeros_(self.head.master)
        self.repack()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Values [C] float32, on the CPU, of the states before a packed batch's targets."""
        return self.head(packed_hidden(self.trunk, batch)).squeeze(1).cpu()

    def repack(self) -> None:
        """Brings the packed storage up to date with the masters."""
        self.trunk.repack()
        self.head.repack()


class Critic:
    """Values in training: of each state, the discounted sum of the rewards that the policy still gets.

    model: the policy's, whose weights the trunk begins with; numerics, device, gradient_checkpointing: as the policy's.
    With a head of zeros every value is exactly 0 before the first update. head_learning_rate: the head's own, since it
    has everything to learn; learning_rate where None. ranks: the policy's. All of them call the same methods, with
    micro-batches of their own; values are the same bits on any number. The other settings are MasterOptimizer's.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        numerics: Numerics = "auto",
        device: Device = "auto",
        learning_rate: float = 1e-5,
        head_learning_rate: float | None = None,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
        learning_rate_schedule: LearningRateSchedule = "constant",
        num_optimizer_steps: int | None = None,
        gradient_checkpointing: bool = False,
        ranks: Ranks = ONLY_RANK,
    ) -> None:
        self.ranks = ranks
        ops = make_ops(numerics, device)
        trunk = load_transformer(
            resolve_model(model), ops, with_masters=True, gradient_checkpointing=gradient_checkpointing
        )
        self.model = ValueModel(trunk)
        ranks.prepare(self.model, [*trunk.layers, trunk])
        self.optimizer = MasterOptimizer(
            [
                (self.model.trunk.parameters(), learning_rate),
                (self.model.head.parameters(), head_learning_rate or learning_rate),
            ],
            betas=betas,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            warmup_steps=warmup_steps,
            learning_rate_schedule=learning_rate_schedule,
            num_optimizer_steps=num_optimizer_steps,
            ranks=ranks,
        )

    @torch.no_grad()
    def values(self, batch: PackedBatch) -> torch.Tensor:
        """Values [C] float32 of the states before the batch's targets, the same bits however they are packed."""
        values = self.model(batch)
        self.ranks.end_forward(self.model)
        return values

    def forward_backward(
        self,
        batch: PackedBatch,
        old_values: torch.Tensor,
        returns: torch.Tensor,
        *,
        num_tokens: int,
        clip: float | None = None,
    ) -> LossOutput:
        """One forward and backward of `value_loss`; gradients add up until optim_step.

        old_values, returns: [C] float32. num_tokens: of all batches, of all ranks, whose gradients are to add up.
        """
        values = self.model(batch)
        self.ranks.end_forward(self.model)
        loss = value_loss(values, old_values, returns, batch.loss_mask, num_tokens=num_tokens, clip=clip)
        self.optimizer.backward(loss.loss)
        return loss

    def optim_step(self) -> dict[str, float]:
        """Clip the gradient, move the masters, repack them for the kernels."""
        self.ranks.reduce_gradients(self.model)
        grad_norm, learning_rate = self.optimizer.step()
        self.ranks.repack(self.model)
        return {"critic/grad_norm": grad_norm, "critic/lr": learning_rate}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, float32 tensor) of every weight: Hugging Face's names of the trunk, score.weight and score.bias.

        They are those of a token classification model with one label. All ranks must read on to the end together.
        """
        yield from self.ranks.named_weights(self.model.trunk)
        yield from self._whole_head().items()

    def load_weights(self, named_tensors: NamedTensors) -> None:
        """Replaces every weight by those that `named_weights` gave; ValueError where they are not this model's."""
        tensors = dict(named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors)
        masters = self._head_masters()
        head = {name: tensors.pop(name, None) for name in masters}
        for name, tensor in head.items():
            shape = tuple(masters[name].shape)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise ValueError(f"weight {name!r} of the critic is {found}; needed: floats of shape {shape}")
        self.ranks.load_weights(self.model.trunk, tensors)
        with torch.no_grad():
            self.ranks.end_forward(self.model)
            for name, master in self._head_masters().items():
                whole = head[name].detach().to(master.device, torch.float32)
                master.copy_(self.ranks.part(whole, master))
        self.ranks.repack(self.model)

    def checkpoint_num_bytes(self) -> int:
        """What `save_checkpoint` writes."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters())  # the weights and two moments

    def save_checkpoint(self, directory: Path) -> None:
        """Writes weights and optimiser, which rank 0 does; OSError there where the disk does not take them."""
        moments = self.optimizer.tensors(dict(self.model.named_parameters()))
        self.ranks.lead(chain(self.named_weights(), moments), lambda tensors: self._write(directory, tensors))

    def load_checkpoint(self, directory: Path) -> None:
        """Goes on, to the bit, from what `save_checkpoint` wrote; ValueError where it is another model's."""
        self.load_weights(load_file(directory / WEIGHTS_FILE))
        self.optimizer.load(directory / OPTIMIZER_FILE, dict(self.model.named_parameters()))

    def _write(self, directory: Path, tensors: Iterator[NamedTensor]) -> None:
        """tensors: all weights, then the optimiser's."""
        num_weights = len(self.model.trunk.weight_shapes()) + len(self._head_masters())
        weights = {name: tensor.contiguous() for name, tensor in islice(tensors, num_weights)}
        with safetensors_errors():
            save_file(weights, directory / WEIGHTS_FILE)
            self.optimizer.save(directory / OPTIMIZER_FILE, dict(self.model.named_parameters()), tensors)

    def _head_masters(self) -> dict[str, nn.Parameter]:
        return {HEAD_WEIGHT: self.model.head.master, HEAD_BIAS: self.model.head.bias}

    def _whole_head(self) -> dict[str, torch.Tensor]:
        return {name: self.ranks.full(master).detach() for name, master in self._head_masters().items()}
