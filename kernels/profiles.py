"""Numerics profiles: what is rounded to which type, and how products are summed (docs/numerics.md, "Profiles")."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One way to compute, on which engine and trainer must agree."""

    name: str
    weight_dtype: torch.dtype  # of matrices in packed storage; norms and biases are float32 in every profile
    kv_dtype: torch.dtype  # of keys and values in the KV pool
    is_dot: bool  # products round their other operand to bfloat16 and sum by the bfloat16 dot product


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="float32", weight_dtype=torch.float32, kv_dtype=torch.float32, is_dot=False),
        Profile(name="bfloat16", weight_dtype=torch.bfloat16, kv_dtype=torch.bfloat16, is_dot=False),
        Profile(name="bfloat16-dot", weight_dtype=torch.bfloat16, kv_dtype=torch.bfloat16, is_dot=True),
    )
}

GPU_PROFILES = {  # what they round where is in docs/numerics.md, "GPU profile"
    profile.name: profile
    for profile in (
        Profile(name="gpu-float32", weight_dtype=torch.float32, kv_dtype=torch.float32, is_dot=False),
        Profile(name="gpu-bfloat16", weight_dtype=torch.bfloat16, kv_dtype=torch.bfloat16, is_dot=False),
    )
}


def get_profile(name: str) -> Profile:
    """The CPU profile of a name; ValueError names those that exist."""
    if name not in PROFILES:
        raise ValueError(f"profile={name!r} must be one of: {', '.join(PROFILES)}")
    return PROFILES[name]
