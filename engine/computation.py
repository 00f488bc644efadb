"""Computation: which numerics profile on which device - the one rule for both engine and trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Numerics = Literal["auto", "float32", "bfloat16", "bfloat16-dot"]
Device = Literal["auto", "cpu", "cuda", "interpreter"]
DeviceName = Literal["cpu", "cuda", "interpreter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """A profile in force on a device in force, as this process sees the machine."""

    profile_name: str  # of kernels.profiles: PROFILES on the CPU, GPU_PROFILES elsewhere
    device_name: DeviceName

    @classmethod
    def resolve(cls, numerics: Numerics, device: Device) -> Computation:
        """What is asked for, "auto" settled: cuda where torch finds one, unless numerics is a CPU's; float32 on a CPU
        and bfloat16 elsewhere. Raises ValueError as `check_computation` does.
        """
        check_computation(numerics, device)
        if device == "auto":
            device = "cuda" if numerics != "bfloat16-dot" and _has_cuda() else "cpu"
        if device == "cpu":
            return cls(profile_name="float32" if numerics == "auto" else numerics, device_name=device)
        return cls(profile_name="gpu-float32" if numerics == "float32" else "gpu-bfloat16", device_name=device)


def check_computation(numerics: Numerics, device: Device) -> None:
    """Raises ValueError for names that do not exist, a device that is not there, or numerics that it does not have.

    torch is imported only where cuda is asked for by name.
    """
    require_choice("numerics", numerics, get_args(Numerics))
    require_choice("device", device, get_args(Device))
    if device == "cuda" and not _has_cuda():
        raise ValueError("device='cuda' is not available: torch finds no CUDA device here. Use 'auto' or 'cpu'")
    if device in ("cuda", "interpreter") and numerics == "bfloat16-dot":
        raise ValueError(
            f"numerics={numerics!r} is a profile of the CPU: on device={device!r} use 'bfloat16' or 'float32'"
        )


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises ValueError, naming what there is, for a value that is none of these."""
    # by type as well, since 1 == True in Python
    if not any(value == choice and isinstance(value, type(choice)) for choice in choices):
        available = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}={value!r} is not available in this version: use {available}")


def _has_cuda() -> bool:
    import torch  # a config that does not ask leaves it out

    return torch.cuda.is_available()
