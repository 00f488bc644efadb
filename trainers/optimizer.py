"""MasterOptimizer: AdamW over float32 masters, with a warm-up and a clipped gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn


class MasterOptimizer:
    """What Policy and Critic learn with; gradients add up until `step`.

    The learning rate rises linearly over warmup_steps, the first step taking 1 / warmup_steps of it.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        self.learning_rate, self.warmup_steps, self.max_grad_norm = learning_rate, warmup_steps, max_grad_norm
        self.accelerator = Accelerator(cpu=True)
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
        )
        self.num_updates = 0

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> tuple[float, float]:
        """Clip the gradient and move the masters; (norm of the gradient before it was clipped, learning rate).

        Raises FloatingPointError where the norm is not finite; nothing has moved then.
        """
        grad_norm = float(self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"gradient norm {grad_norm} at update {self.num_updates}: the weights were left as they were; lower "
                f"learning_rate={self.learning_rate} or look at the rewards"
            )
        learning_rate = self._current_learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_updates += 1
        return grad_norm, learning_rate

    def _current_learning_rate(self) -> float:
        return self.learning_rate * min(1.0, (self.num_updates + 1) / max(1, self.warmup_steps))
