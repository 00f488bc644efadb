"""CPUOps: the C kernels, on packed weights."""

from __future__ import annotations

import torch

import kernels
from engine.ops import HeadNormWeights
from kernels.activation import silu_and_mul
from kernels.attention import (
    PackedPlan,
    check_attention_shape,
    copy_blocks,
    kv_store,
    packed_attention,
    paged_attention,
)
from kernels.linear import embedding, linear, pack_rows, packed_shape, unpack_rows
from kernels.logprobs import sample, token_logprobs
from kernels.profiles import Profile
from kernels.rms_norm import add_rms_norm, head_norms, rms_norm
from kernels.rotary import rotary
from kernels.storage import HugePages, empty_storage


class CPUOps:
    """See `engine.ops.Ops`. Matrices are packed; key blocks are [P, K, H, S], value blocks [P, K, S, H]."""

    device = torch.device("cpu")
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    silu_and_mul = staticmethod(silu_and_mul)
    copy_blocks = staticmethod(copy_blocks)
    kv_store = staticmethod(kv_store)
    paged_attention = staticmethod(paged_attention)
    packed_attention = staticmethod(packed_attention)
    embedding = staticmethod(embedding)
    read_rows = staticmethod(unpack_rows)

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._pages = HugePages()

    def fingerprint(self) -> str:
        return kernels.fingerprint(self.profile.name)

    def new_matrix(self, num_outputs: int, num_inputs: int) -> torch.Tensor:
        dtype = self.profile.weight_dtype
        return self._pages.empty(*packed_shape(num_outputs, num_inputs, dtype), dtype=dtype).zero_()

    def write_rows(self, matrix: torch.Tensor, rows_NK: torch.Tensor, first_row: int) -> None:
        pack_rows(matrix, rows_NK.to(device="cpu", dtype=torch.float32), first_row)

    def linear(self, x_TK, matrix, num_outputs, bias=None, master=None, into_residual=False) -> torch.Tensor:
        return linear(x_TK, matrix, num_outputs, bias, master, self.profile.is_dot)

    def select_rows(self, x_TD: torch.Tensor, rows_C: torch.Tensor) -> torch.Tensor:
        return x_TD.index_select(0, rows_C)

    def rotary(
        self,
        qk_TXH: torch.Tensor,
        positions_T: torch.Tensor,
        table: torch.Tensor,
        norms: HeadNormWeights | None,
        num_heads: int,
        eps: float,
    ) -> torch.Tensor:
        if norms is not None:
            qk_TXH = head_norms(qk_TXH, *norms, num_heads, eps)
        return rotary(qk_TXH, positions_T, table)

    def new_blocks(self, num_layers, num_blocks, num_kv_heads, head_dim, block_size):
        check_attention_shape(head_dim, block_size)
        # Unwritten pages of it cost no memory.
        width = num_kv_heads * head_dim * block_size
        storage = empty_storage(2, num_layers, num_blocks, width, dtype=self.profile.kv_dtype)
        shape = (num_layers, num_blocks, num_kv_heads)
        keys = storage[0].view(*shape, head_dim, block_size)
        return storage.flatten(0, 1), keys, storage[1].view(*shape, block_size, head_dim)

    def packed_plan(self, segments: list[tuple[int, int, int]]) -> PackedPlan:
        return PackedPlan(segments, kv_dtype=self.profile.kv_dtype)

    def sample(self, hidden_TD, matrix, vocab_size, temperature_T, draws) -> tuple[torch.Tensor, torch.Tensor]:
        row, seed, position, index, is_greedy = draws
        keys = row, seed, position, index, is_greedy.to(torch.uint8)
        return sample(hidden_TD, matrix, vocab_size, temperature_T, *keys, self.profile.is_dot)

    def token_logprobs(self, hidden_CD, matrix, vocab_size, target_ids, temperature, master=None) -> torch.Tensor:
        is_dot = self.profile.is_dot
        return token_logprobs(hidden_CD, matrix, vocab_size, target_ids, temperature, master, is_dot)
