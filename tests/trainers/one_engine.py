"""OneEngine: stands where a pool's handle does in the tests of trainer actors."""

from __future__ import annotations

from engine import LLMEngine


class OneEngine:
    """Stands where a pool's handle does: one engine of this process takes the weights."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine

    def sync_weights(self, named_tensors, policy_version, mode):
        return self.engine.update_weights(named_tensors, policy_version, mode)
