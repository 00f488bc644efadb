"""MasterOptimizer: AdamW over float32 masters, with a schedule and a clipped gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from trainers.optimizer_file import load_optimizer, save_optimizer
from trainers.optimizer_state import Parameters, load_optimizer_tensors, optimizer_tensors, state_shapes
from trainers.ranks import ONLY_RANK, NamedTensor, Ranks
from trainers.schedule import LearningRateSchedule, check_schedule, learning_rate_factor

ParameterGroup = tuple[Iterable[nn.Parameter], float]
"""(masters, their learning rate after warm-up)."""


class MasterOptimizer:
    """What Policy and Critic learn with; gradients add up until `step`.

    The gradients of all groups together are shortened to max_grad_norm. learning_rate_schedule, warmup_steps and
    num_optimizer_steps (which a falling schedule needs): see `learning_rate_factor`. ranks: those that hold the
    parameters, and that have distributed them before; every method is then called on all of them.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
        learning_rate_schedule: LearningRateSchedule = "constant",
        num_optimizer_steps: int | None = None,
        ranks: Ranks = ONLY_RANK,
    ) -> None:
        check_schedule(learning_rate_schedule, num_optimizer_steps)
        masters = [list(parameters) for parameters, _ in groups]
        self.parameters = [parameter for group in masters for parameter in group]
        self.learning_rates = [learning_rate for _, learning_rate in groups]
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        self.learning_rate_schedule, self.num_optimizer_steps = learning_rate_schedule, num_optimizer_steps
        self.ranks, self.accelerator = ranks, Accelerator(cpu=True)
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                [{"params": group, "lr": rate} for group, rate in zip(masters, self.learning_rates, strict=True)],
                betas=betas,
                weight_decay=weight_decay,
                fused=True,
            )
        )
        self.num_updates = 0

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> tuple[float, float]:
        """Clip the gradient and move the masters; (its norm before it was clipped, the first group's learning rate).

        Raises FloatingPointError where the norm is not finite; nothing has moved then.
        """
        grad_norm = float(self.ranks.full(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)))
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"gradient norm {grad_norm} at update {self.num_updates}: the weights were left as they were; lower "
                f"learning_rate={self.learning_rates[0]} or look at the rewards"
            )
        factor = learning_rate_factor(
            self.num_updates,
            schedule=self.learning_rate_schedule,
            warmup_steps=self.warmup_steps,
            num_steps=self.num_optimizer_steps,
        )
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_updates += 1
        return grad_norm, self.learning_rates[0] * factor

    def tensors(self, parameters: Parameters) -> Iterator[NamedTensor]:
        """The state by name, whole, one tensor at a time (see `optimizer_tensors`): what `save` wants."""
        return optimizer_tensors(self._adamw, parameters, self.ranks)

    def save(self, path: Path, parameters: Parameters, tensors: Iterable[NamedTensor], **counters: int) -> None:
        """Writes the state and counters, num_updates among them; with several ranks one calls this.

        parameters: the masters by name, in their order. tensors: what `tensors` gives for them.
        """
        counters = {"num_updates": self.num_updates, **counters}
        save_optimizer(path, state_shapes(self._adamw, parameters), tensors, counters)

    def load(self, path: Path, parameters: Parameters) -> dict[str, int]:
        """Goes on from what `save` wrote; the counters. ValueError where it is another optimiser's, or not readable."""
        tensors, counters = load_optimizer(path)
        try:
            load_optimizer_tensors(self._adamw, parameters, tensors, self.ranks)
        except ValueError as error:
            raise ValueError(f"{path} is not this optimiser's: {error}") from error
        if "num_updates" not in counters:
            raise ValueError(f"{path} is not a readable optimiser file: it does not say its num_updates")
        self.num_updates = counters["num_updates"]
        return counters

    @property
    def _adamw(self) -> torch.optim.AdamW:
        return self.optimizer.optimizer  # accelerate's wrapper knows no parameter names
