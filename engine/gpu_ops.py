"""GPUOps: the Triton kernels, on plain weights [N, K] (docs/numerics.md, "GPU profile")."""

from __future__ import annotations

import torch

from engine.ops import HeadNormWeights
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.attention import check_attention_shape, copy_blocks, kv_store, paged_attention
from kernels.gpu.fingerprint import fingerprint
from kernels.gpu.launch import is_interpreted
from kernels.gpu.linear import embedding, linear
from kernels.gpu.logprobs import sample, token_logprobs
from kernels.gpu.packed_attention import packed_attention
from kernels.gpu.packed_plan import PackedPlan
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.rotary import norm_and_rotary, rotary
from kernels.profiles import Profile


class GPUOps:
    """See `engine.ops.Ops`. Key and value blocks are both [P, K, S, H].

    Raises ValueError where the device cannot run the kernels.
    """

    embedding = staticmethod(embedding)
    silu_and_mul = staticmethod(silu_and_mul)
    kv_store = staticmethod(kv_store)
    paged_attention = staticmethod(paged_attention)
    packed_attention = staticmethod(packed_attention)

    def __init__(self, profile: Profile, device: torch.device) -> None:
        if device.type != "cuda" and not is_interpreted():
            raise ValueError(
                f"profile={profile.name!r} on device={str(device)!r} needs Triton's interpreter: set "
                "TRITON_INTERPRET=1 before Python starts, or use a CUDA device"
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.profile, self.device, self.dtype = profile, device, profile.weight_dtype

    def fingerprint(self) -> str:
        return fingerprint(self.device, self.dtype)

    def new_matrix(self, num_outputs: int, num_inputs: int) -> torch.Tensor:
        return torch.zeros(num_outputs, num_inputs, dtype=self.dtype, device=self.device)

    def write_rows(self, matrix: torch.Tensor, rows_NK: torch.Tensor, first_row: int) -> None:
        matrix[first_row : first_row + rows_NK.shape[0]].copy_(rows_NK)  # to nearest, ties to even

    def read_rows(self, matrix: torch.Tensor, first_row: int, num_rows: int) -> torch.Tensor:
        return matrix[first_row : first_row + num_rows].to(torch.float32, copy=True)

    def linear(self, x_TK, matrix, num_outputs, bias=None, master=None, into_residual=False) -> torch.Tensor:
        return linear(x_TK, matrix, bias, torch.float32 if into_residual else self.dtype, master)

    def select_rows(self, x_TD: torch.Tensor, rows_C: torch.Tensor) -> torch.Tensor:
        # its backward sorts the rows, where that of index_select would let equal ones race on CUDA
        return torch.nn.functional.embedding(rows_C, x_TD)

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x_TD, weight_D, eps, self.dtype)

    def add_rms_norm(self, x_TD, delta_TD, weight_D, eps) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x_TD, delta_TD, weight_D, eps, self.dtype)

    def rotary(
        self,
        qk_TXH: torch.Tensor,
        positions_T: torch.Tensor,
        table: torch.Tensor,
        norms: HeadNormWeights | None,
        num_heads: int,
        eps: float,
    ) -> torch.Tensor:
        if norms is None:
            return rotary(qk_TXH, positions_T, table)
        return norm_and_rotary(qk_TXH, positions_T, table, *norms, num_heads, eps)

    def new_blocks(self, num_layers, num_blocks, num_kv_heads, head_dim, block_size):
        check_attention_shape(head_dim, block_size)
        shape = (2, num_layers, num_blocks, num_kv_heads, block_size, head_dim)
        storage = torch.empty(shape, dtype=self.profile.kv_dtype, device=self.device)
        return storage.flatten(0, 1), storage[0], storage[1]

    def copy_blocks(self, storage: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
        if pairs:
            copy_blocks(storage, torch.tensor(pairs, dtype=torch.int64).to(self.device, non_blocking=True))

    def packed_plan(self, segments: list[tuple[int, int, int]]) -> PackedPlan:
        return PackedPlan(segments, self.device)

    def draw(self, hidden_TD, matrix, temperature_T, draws) -> tuple[torch.Tensor, torch.Tensor]:
        """`sample` without the transfer to the CPU."""
        row, seed, position, index, is_greedy = draws
        keys = row, seed, position, index, is_greedy.to(torch.uint8)
        return sample(hidden_TD, matrix, temperature_T, *keys)

    def sample(self, hidden_TD, matrix, vocab_size, temperature_T, draws) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, logprobs = self.draw(hidden_TD, matrix, temperature_T, draws)
        # one transfer, and so one wait for the device
        words = torch.stack([token_ids.to(torch.int32), logprobs.view(torch.int32)]).cpu()
        return words[0], words[1].view(torch.float32)

    def token_logprobs(self, hidden_CD, matrix, vocab_size, target_ids, temperature, master=None) -> torch.Tensor:
        return token_logprobs(hidden_CD, matrix, target_ids, temperature, master)
