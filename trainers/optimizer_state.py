"""Optimiser state: AdamW's moments by name, whole, one at a time - the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from trainers.ranks import ONLY_RANK, NamedTensor, Ranks

STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")  # per parameter: [] float32, and two tensors of its shape

Parameters = Mapping[str, torch.Tensor]
"""An optimiser's masters by name, in their order."""


def state_shapes(optimizer: torch.optim.AdamW, parameters: Parameters) -> dict[str, tuple[int, ...]]:
    """What `optimizer_tensors` gives, `NAME.step`, `NAME.exp_avg` and `NAME.exp_avg_sq`, with the shape of each.

    A parameter that has never been stepped has no state.
    """
    return {
        f"{name}.{entry}": () if entry == "step" else tuple(parameter.shape)
        for name, parameter in parameters.items()
        for entry in STATE_NAMES
        if entry in optimizer.state.get(parameter, {})
    }


def optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: Parameters, ranks: Ranks = ONLY_RANK
) -> Iterator[NamedTensor]:
    """(name, whole float32 tensor) of the state, in the order of `state_shapes`.

    With several ranks all must read on to the end together, and only one moment is whole at a time (`Ranks.lead` does
    so).
    """
    for label in state_shapes(optimizer, parameters):
        name, _, entry = label.rpartition(".")
        yield label, ranks.full(optimizer.state[parameters[name]][entry])


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW,
    parameters: Parameters,
    named_tensors: Iterable[NamedTensor],
    ranks: Ranks = ONLY_RANK,
) -> None:
    """Gives the optimiser the state that `optimizer_tensors` gave, on every rank; each keeps its part.

    Raises ValueError for a name that is unknown, a shape that is not the parameter's, or a parameter of whose state
    some is missing; the optimiser is left as it was.
    """
    states: dict[str, dict[str, torch.Tensor]] = {}
    for label, whole in named_tensors:
        name, _, entry = label.rpartition(".")
        if entry not in STATE_NAMES or name not in parameters:
            raise ValueError(f"it holds tensors of other parameters, such as {label!r}")
        shape = () if entry == "step" else tuple(parameters[name].shape)
        if tuple(whole.shape) != shape:
            raise ValueError(f"{label!r} has the shape {tuple(whole.shape)}, not {shape}")
        states.setdefault(name, {})[entry] = _part(whole, parameters[name], ranks)
    for name, state in states.items():
        if state.keys() != set(STATE_NAMES):
            raise ValueError(f"of the state of {name!r} only {sorted(state)} are given, not all of {STATE_NAMES}")
    optimizer.state.clear()
    for name, state in states.items():
        optimizer.state[parameters[name]] = state


def _part(whole: torch.Tensor, parameter: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    whole = whole.detach().to(device=parameter.device, dtype=torch.float32, copy=True)
    return ranks.part(whole, parameter) if whole.dim() else whole
