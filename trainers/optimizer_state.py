"""Optimiser state: AdamW's moments by name, whole, one at a time - the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainers.policy import Policy

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


def optimizer_tensors(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """(key/parameter, whole float32 tensor) of the optimiser's state; nothing before its first step.

    A moment has the shape of its parameter, as Policy.model.named_parameters() names it, a step has none. With several
    ranks all must read on to the end together, and only one moment is whole at a time (`Ranks.lead` does so).
    """
    for name, parameter in policy.model.named_parameters():
        state = policy.optimizer.state.get(parameter, {})
        for key in STATE_KEYS if state else ():
            yield f"{key}/{name}", policy.ranks.full(state[key])


def load_optimizer_tensors(policy: Policy, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Gives the optimiser the state that `optimizer_tensors` gave, on every rank; each keeps its part.

    Without a tensor, the optimiser is as before its first step. Raises ValueError for a name that is unknown, a shape
    that is not the parameter's, or an incomplete state; the optimiser is left as it was.
    """
    parameters = dict(policy.model.named_parameters())
    states: dict[str, dict[str, torch.Tensor]] = {}
    for label, whole in named_tensors:
        key, _, name = label.partition("/")
        if key not in STATE_KEYS or name not in parameters:
            raise ValueError(f"the optimiser has no state {label!r}: it comes from another model or optimiser")
        states.setdefault(name, {})[key] = _part(policy, label, whole, parameters[name])
    if states and (
        states.keys() != parameters.keys() or any(state.keys() != set(STATE_KEYS) for state in states.values())
    ):
        raise ValueError(
            f"the state of {len(states)} of {len(parameters)} parameters was given, or not all of {STATE_KEYS} of one: "
            "give everything that optimizer_tensors gave"
        )
    policy.optimizer.state.clear()
    for name, state in states.items():
        policy.optimizer.state[parameters[name]] = state


def _part(policy: Policy, label: str, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    shape = torch.Size() if label.startswith("step/") else parameter.shape
    if whole.shape != shape:
        raise ValueError(f"optimiser state {label!r} has shape {tuple(whole.shape)}; needed: {tuple(shape)}")
    whole = whole.detach().to(device=parameter.device, dtype=torch.float32, copy=True)
    return policy.ranks.part(whole, parameter) if whole.dim() else whole
