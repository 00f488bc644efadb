"""Log-probabilities and sampling straight from hidden states; one set of sums serves engine and trainer.

Logits are never written out: a panel of 64 vocabulary entries is reduced to its maximum and its sum of exponentials
while it is in registers, and the one panel that holds the token is computed again (docs/numerics.md, "Log-sum-exp").
"""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.linear import PANEL, check_float32, linear

BACKWARD_ROWS = 256  # logits of so many rows exist at once in the backward pass


def vocab_stats(
    hidden_TD: torch.Tensor, packed: torch.Tensor, vocab_size: int, temperature_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_max, block_sum), each [T, ceil(V / 64)] float32, of the logits hidden @ weight.T / temperature."""
    num_rows, width = hidden_TD.shape
    check_float32(hidden_TD, "hidden")
    check_float32(temperature_T, "temperature")
    shape = (num_rows, (vocab_size + PANEL - 1) // PANEL)
    block_max, block_sum = hidden_TD.new_empty(shape), hidden_TD.new_empty(shape)
    library().ls_vocab_stats(
        hidden_TD.data_ptr(), packed.data_ptr(), temperature_T.data_ptr(), block_max.data_ptr(), block_sum.data_ptr(),
        num_rows, vocab_size, width,
    )  # fmt: skip
    return block_max, block_sum


def sample(
    hidden_TD: torch.Tensor,
    packed: torch.Tensor,
    vocab_size: int,
    temperature_T: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    is_greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token for each entry of `rows`: (token_ids [n] int64, logprobs [n] float32).

    Args:
        hidden_TD: float32 hidden states; several draws may share a row.
        temperature_T: float32, one per row, 1.0 where greedy.
        rows, positions, indices: int64 [n]; row of the draw, its position in the completion, its sample index.
        seeds: int64 [n], the 64 bits of the key. is_greedy: uint8 [n].
    """
    hidden_TD = hidden_TD.contiguous()
    block_max, block_sum = vocab_stats(hidden_TD, packed, vocab_size, temperature_T)
    token_ids, logprobs = rows.new_empty(rows.shape[0]), hidden_TD.new_empty(rows.shape[0])
    library().ls_draw(
        hidden_TD.data_ptr(), packed.data_ptr(), temperature_T.data_ptr(), block_max.data_ptr(), block_sum.data_ptr(),
        rows.data_ptr(), seeds.data_ptr(), positions.data_ptr(), indices.data_ptr(), is_greedy.data_ptr(),
        token_ids.data_ptr(), logprobs.data_ptr(), None, None, rows.shape[0], vocab_size, hidden_TD.shape[1],
    )  # fmt: skip
    return token_ids, logprobs


def token_logprobs(
    hidden_CD: torch.Tensor,
    packed: torch.Tensor,
    vocab_size: int,
    target_ids: torch.Tensor,
    temperature: torch.Tensor,
    master: torch.Tensor | None = None,
) -> torch.Tensor:
    """logprobs[C] of target_ids [C] int64 under softmax(hidden @ weight.T / temperature), temperature [C] float32.

    Differentiable in hidden and in `master`, the weight as a float32 tensor [V, D].
    """
    if torch.is_grad_enabled() and (hidden_CD.requires_grad or (master is not None and master.requires_grad)):
        if master is None:
            raise ValueError(
                "hidden requires a gradient, which packed storage cannot give: pass master, the weight [V, D]"
            )
        return _TokenLogprobs.apply(hidden_CD, packed, vocab_size, target_ids, temperature, master)
    return _token_logprobs(hidden_CD, packed, vocab_size, target_ids, temperature)[0]


def _token_logprobs(hidden, packed, vocab_size, target_ids, temperature):
    hidden = hidden.contiguous()
    num_rows = hidden.shape[0]
    block_max, block_sum = vocab_stats(hidden, packed, vocab_size, temperature)
    logprobs, row_max = hidden.new_empty(num_rows), hidden.new_empty(num_rows)
    row_sum = hidden.new_empty(num_rows, dtype=torch.float64)
    library().ls_draw(
        hidden.data_ptr(), packed.data_ptr(), temperature.data_ptr(), block_max.data_ptr(), block_sum.data_ptr(),
        None, None, None, None, None, target_ids.data_ptr(), logprobs.data_ptr(), row_max.data_ptr(),
        row_sum.data_ptr(), num_rows, vocab_size, hidden.shape[1],
    )  # fmt: skip
    return logprobs, row_max, row_sum


class _TokenLogprobs(torch.autograd.Function):
    """Backward in chunks of rows: logits again, softmax in place, two products."""

    @staticmethod
    def forward(ctx, hidden, packed, vocab_size, target_ids, temperature, master):
        hidden = hidden.contiguous()
        logprobs, row_max, row_sum = _token_logprobs(hidden, packed, vocab_size, target_ids, temperature)
        ctx.save_for_backward(hidden, packed, target_ids, temperature, master, row_max, row_sum)
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        hidden, packed, target_ids, temperature, master, row_max, row_sum = ctx.saved_tensors
        needs_hidden, needs_master = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_master = torch.zeros_like(master) if needs_master else None
        slope = grad / temperature
        with torch.no_grad():
            for begin in range(0, hidden.shape[0], BACKWARD_ROWS):
                chunk = slice(begin, begin + BACKWARD_ROWS)
                weight = -slope[chunk] / row_sum[chunk].float()
                dz = linear(hidden[chunk], packed, master.shape[0])
                dz.div_(temperature[chunk, None]).sub_(row_max[chunk, None]).exp_().mul_(weight[:, None])
                dz[torch.arange(dz.shape[0]), target_ids[chunk]] += slope[chunk]
                if needs_hidden:
                    torch.mm(dz, master, out=grad_hidden[chunk])
                if needs_master:
                    grad_master.addmm_(dz.T, hidden[chunk])
        return grad_hidden, None, None, None, None, grad_master
