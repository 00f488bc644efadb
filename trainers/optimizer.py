"""MasterOptimizer: AdamW over float32 masters, with a warm-up and a clipped gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

ParameterGroup = tuple[Iterable[nn.Parameter], float]
"""(masters, their learning rate after warm-up)."""


class MasterOptimizer:
    """What Policy and Critic learn with; gradients add up until `step`.

    The learning rate rises linearly over warmup_steps, the first step taking 1 / warmup_steps of it. The gradients of
    all groups together are shortened to max_grad_norm.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        masters = [list(parameters) for parameters, _ in groups]
        self.parameters = [parameter for group in masters for parameter in group]
        self.learning_rates = [learning_rate for _, learning_rate in groups]
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        self.accelerator = Accelerator(cpu=True)
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
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"gradient norm {grad_norm} at update {self.num_updates}: the weights were left as they were; lower "
                f"learning_rate={self.learning_rates[0]} or look at the rewards"
            )
        factor = min(1.0, (self.num_updates + 1) / max(1, self.warmup_steps))
        for group, learning_rate in zip(self.optimizer.param_groups, self.learning_rates, strict=True):
            group["lr"] = learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_updates += 1
        return grad_norm, self.learning_rates[0] * factor
