"""Ops: what a model computes with on one kind of device, chosen once when the model is made."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from engine.computation import Computation, Device, Numerics
from kernels.profiles import GPU_PROFILES, PROFILES, Profile

HeadNormWeights = tuple[torch.Tensor, torch.Tensor]  # of queries and keys, [H] float32 each


class Ops(Protocol):
    """The operations of one profile on one device; a matrix [N, K] lies as they like to read it.

    `into_residual` says that a product is added to the residual stream, or is logits: float32 in every profile.
    """

    profile: Profile
    device: torch.device  # where weights, blocks and activations lie

    def fingerprint(self) -> str: ...

    def new_matrix(self, num_outputs: int, num_inputs: int) -> torch.Tensor: ...

    def write_rows(self, matrix: torch.Tensor, rows_NK: torch.Tensor, first_row: int) -> None: ...

    def read_rows(self, matrix: torch.Tensor, first_row: int, num_rows: int) -> torch.Tensor: ...

    def linear(
        self,
        x_TK: torch.Tensor,
        matrix: torch.Tensor,
        num_outputs: int,
        bias: torch.Tensor | None = None,
        master: torch.Tensor | None = None,
        into_residual: bool = False,
    ) -> torch.Tensor: ...

    def embedding(
        self, ids_T: torch.Tensor, matrix: torch.Tensor, master: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def select_rows(self, x_TD: torch.Tensor, rows_C: torch.Tensor) -> torch.Tensor:
        """x[rows], [C, D], differentiable: gradients of a row that is named several times add up in a fixed order."""

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def rotary(
        self,
        qk_TXH: torch.Tensor,
        positions_T: torch.Tensor,
        table: torch.Tensor,
        norms: HeadNormWeights | None,
        num_heads: int,
        eps: float,
    ) -> torch.Tensor:
        """Heads normed, where the family does that, and turned; heads from num_heads on are keys."""

    def silu_and_mul(self, x_T2F: torch.Tensor) -> torch.Tensor: ...

    def new_blocks(
        self, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(storage [2 * L, P, ...] for `copy_blocks`; its key blocks, its value blocks, [L, P, ...], for attention)."""

    def copy_blocks(self, storage: torch.Tensor, pairs: list[tuple[int, int]]) -> None: ...

    def kv_store(
        self,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None: ...

    def paged_attention(
        self,
        q_TNH: torch.Tensor,
        key_blocks: torch.Tensor,
        value_blocks: torch.Tensor,
        block_tables: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        window: int,
    ) -> torch.Tensor: ...

    def packed_plan(self, segments: list[tuple[int, int, int]]) -> Any: ...

    def packed_attention(
        self, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, plan: Any, scale: float, window: int
    ) -> torch.Tensor: ...

    def sample(
        self,
        hidden_TD: torch.Tensor,
        matrix: torch.Tensor,
        vocab_size: int,
        temperature_T: torch.Tensor,
        draws: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids [n] integers, logprobs [n] float32), on the CPU, for the columns of draws [5, n] int64: row of
        hidden, seed, position in the completion, sample index, greedy."""

    def token_logprobs(
        self,
        hidden_CD: torch.Tensor,
        matrix: torch.Tensor,
        vocab_size: int,
        target_ids: torch.Tensor,
        temperature: torch.Tensor,
        master: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


def make_ops(numerics: Numerics, device: Device = "cpu") -> Ops:
    """The ops of engine and trainer alike for numerics on a device, both as EngineConfig takes them.

    Raises ValueError for what does not exist or does not go together.
    """
    computation = Computation.resolve(numerics, device)
    if computation.device_name != "cpu":
        from engine.gpu_ops import GPUOps  # needs triton, which a machine without a GPU may lack

        place = "cuda" if computation.device_name == "cuda" else "cpu"  # where the interpreter's tensors lie
        return GPUOps(GPU_PROFILES[computation.profile_name], torch.device(place))
    from engine.cpu_ops import CPUOps

    return CPUOps(PROFILES[computation.profile_name])
