"""TorchOps: the engine with cuBLAS and SDPA swapped in, to see what invariance costs. Its bits depend on the batch."""

from __future__ import annotations

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from engine.gpu_ops import GPUOps
from kernels.profiles import GPU_PROFILES


class TorchOps(GPUOps):
    """Products by cuBLAS and, with `sdpa_rows`, attention of decode steps of so many requests by SDPA.

    SDPA wants the keys and values of a request side by side, so then every request must have one block, among the first
    `sdpa_rows`, as in a fresh engine. It reads all slots of them, which is the right work for requests that fill them.
    """

    def __init__(self, *, sdpa_rows: int = 0) -> None:
        super().__init__(GPU_PROFILES["gpu-bfloat16"], torch.device("cuda"))
        self.sdpa_rows = sdpa_rows

    def fingerprint(self) -> str:
        return "none: not invariant"

    def linear(self, x_TK, matrix, num_outputs, bias=None, master=None, into_residual=False) -> torch.Tensor:
        return linear(x_TK, matrix, None if bias is None else bias.to(self.dtype))

    def new_blocks(self, num_layers, num_blocks, num_kv_heads, head_dim, block_size):
        storage, keys, values = super().new_blocks(num_layers, num_blocks, num_kv_heads, head_dim, block_size)
        storage.zero_()  # slots are read before they are written
        return storage, keys, values

    def paged_attention(
        self, q_TNH, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window
    ) -> torch.Tensor:
        num_rows = q_TNH.shape[0]
        if not num_rows == seq_lens.shape[0] == self.sdpa_rows:
            tables = block_tables, cu_seqlens_q, seq_lens
            return GPUOps.paged_attention(q_TNH, key_blocks, value_blocks, *tables, scale, window)
        grouped = q_TNH.unflatten(1, (key_blocks.shape[1], -1))
        block_of_row = block_tables[:, 0].long() % num_rows
        by_block = torch.empty_like(grouped, memory_format=torch.contiguous_format)
        by_block.index_copy_(0, block_of_row, grouped)
        out = scaled_dot_product_attention(by_block, key_blocks[:num_rows], value_blocks[:num_rows], scale=scale)
        return out.index_select(0, block_of_row).flatten(1, 2)

    def draw(self, hidden_TD, matrix, temperature_T, draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one row each; noise over probabilities, as other engines draw."""
        logprobs = (linear(hidden_TD, matrix).float() / temperature_T[:, None]).log_softmax(-1)
        noise = torch.empty_like(logprobs).exponential_()
        token_ids = (logprobs.exp() / noise).argmax(-1)
        return token_ids, logprobs.gather(1, token_ids[:, None])[:, 0]
