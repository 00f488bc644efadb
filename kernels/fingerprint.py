"""The kernel fingerprint: what fixes the bits of a numerics profile. (First version; the numerics builder replaces it.)"""

from __future__ import annotations

import hashlib


def self_test() -> None:
    """Nothing yet."""


def fingerprint(profile: str = "float32") -> str:
    """Hex digest for a profile."""
    if profile != "float32":
        raise ValueError(f"profile={profile!r} must be 'float32'")
    return hashlib.blake2b(b"lockstep 1 " + profile.encode(), digest_size=16).hexdigest()
