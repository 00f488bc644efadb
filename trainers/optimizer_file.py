"""Optimiser file: AdamW's state as safetensors, by parameter name, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

STATE_NAMES = ("step", "exp_avg", "exp_avg_sq")  # per parameter: [] float32, and two tensors of its shape


def save_optimizer(
    path: Path, optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.Tensor], counters: Mapping[str, int]
) -> None:
    """Writes each parameter's state as `NAME.step`, `NAME.exp_avg` and `NAME.exp_avg_sq`, the counters as metadata.

    A parameter that has never been stepped has no state. Settings (learning rate, betas) are the caller's and not
    written.
    """
    tensors = {
        f"{name}.{entry}": optimizer.state[parameter][entry].cpu().contiguous()
        for name, parameter in parameters.items()
        for entry in STATE_NAMES
        if entry in optimizer.state.get(parameter, {})
    }
    save_file(tensors, path, metadata={name: str(value) for name, value in counters.items()})


def load_optimizer(path: Path, optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Puts the state that `save_optimizer` wrote in place of the optimiser's own; returns the counters.

    Raises ValueError for a file that is not readable, or holds the state of other parameters.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no iteration)
            counters = {name: int(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable optimiser file: {error!r}") from error
    state = {
        i: {entry: tensors.pop(f"{name}.{entry}") for entry in STATE_NAMES if f"{name}.{entry}" in tensors}
        for i, name in enumerate(parameters)
    }
    _check_fit(path, state, list(parameters.items()), sorted(tensors))
    kept = {i: of_parameter for i, of_parameter in state.items() if of_parameter}
    optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
    return counters


def _check_fit(
    path: Path,
    state: Mapping[int, Mapping[str, torch.Tensor]],
    parameters: list[tuple[str, torch.Tensor]],
    unknown: list[str],
) -> None:
    if unknown:
        raise ValueError(f"{path} holds {len(unknown)} tensors of other parameters, such as {unknown[0]!r}")
    for i, (name, parameter) in enumerate(parameters):
        shapes = {entry: tuple(tensor.shape) for entry, tensor in state[i].items()}
        expected = dict(zip(STATE_NAMES, ((), tuple(parameter.shape), tuple(parameter.shape))))
        if shapes not in ({}, expected):
            raise ValueError(f"{path}: the state of {name!r} has the shapes {shapes}, not {expected}")
