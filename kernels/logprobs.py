"""Log-probabilities and sampling straight from hidden states; one set of sums serves engine and trainer.

Logits are never written out: a panel of 64 vocabulary entries is reduced to its maximum and its sum of exponentials
while it is in registers, and the one panel that holds the token is computed again (docs/numerics.md, "Log-sum-exp").
"""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.linear import arithmetic, check_float32, multiply, operand
from kernels.operands import packed_columns
from kernels.storage import PANEL

BACKWARD_ROWS = 256  # logit gradients of so many rows exist at once in the backward pass


def vocab_stats(
    hidden_TD: torch.Tensor, packed: torch.Tensor, vocab_size: int, temperature_T: torch.Tensor, is_dot: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_max, block_sum), each [T, ceil(V / 64)] float32, of the logits hidden @ weight.T / temperature."""
    return _vocab_stats(operand(hidden_TD, packed, is_dot, "hidden").contiguous(), packed, vocab_size, temperature_T)


def _vocab_stats(hidden, packed, vocab_size, temperature):
    check_float32(temperature, "temperature")
    shape = (hidden.shape[0], (vocab_size + PANEL - 1) // PANEL)
    block_max, block_sum = temperature.new_empty(shape), temperature.new_empty(shape)
    library().ls_vocab_stats(
        hidden.data_ptr(), packed.data_ptr(), arithmetic(hidden, packed), temperature.data_ptr(), block_max.data_ptr(),
        block_sum.data_ptr(), hidden.shape[0], vocab_size, hidden.shape[1],
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
    is_dot: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token for each entry of `rows`: (token_ids [n] int64, logprobs [n] float32).

    Args:
        hidden_TD: float32 hidden states; several draws may share a row.
        temperature_T: float32, one per row, 1.0 where greedy.
        rows, positions, indices: int64 [n]; row of the draw, its position in the completion, its sample index.
        seeds: int64 [n], the 64 bits of the key. is_greedy: uint8 [n].
        is_dot: logits by the bfloat16 dot product (see `kernels.linear.linear`).
    """
    hidden = operand(hidden_TD, packed, is_dot, "hidden").contiguous()
    block_max, block_sum = _vocab_stats(hidden, packed, vocab_size, temperature_T)
    token_ids, logprobs = rows.new_empty(rows.shape[0]), temperature_T.new_empty(rows.shape[0])
    library().ls_draw(
        hidden.data_ptr(), packed.data_ptr(), arithmetic(hidden, packed), temperature_T.data_ptr(),
        block_max.data_ptr(), block_sum.data_ptr(), rows.data_ptr(), seeds.data_ptr(), positions.data_ptr(),
        indices.data_ptr(), is_greedy.data_ptr(), token_ids.data_ptr(), logprobs.data_ptr(), None, None,
        rows.shape[0], vocab_size, hidden.shape[1],
    )  # fmt: skip
    return token_ids, logprobs


def token_logprobs(
    hidden_CD: torch.Tensor,
    packed: torch.Tensor,
    vocab_size: int,
    target_ids: torch.Tensor,
    temperature: torch.Tensor,
    master: torch.Tensor | None = None,
    is_dot: bool = False,
) -> torch.Tensor:
    """logprobs[C] of target_ids [C] int64 under softmax(hidden @ weight.T / temperature), temperature [C] float32.

    Differentiable in hidden and in `master`, the weight as a float32 tensor [V, D]. `is_dot`: logits by the bfloat16
    dot product (see `kernels.linear.linear`).
    """
    if torch.is_grad_enabled() and (hidden_CD.requires_grad or (master is not None and master.requires_grad)):
        if master is None:
            raise ValueError(
                "hidden requires a gradient, which packed storage cannot give: pass master, the weight [V, D]"
            )
        return _TokenLogprobs.apply(hidden_CD, packed, vocab_size, target_ids, temperature, master, is_dot)
    hidden = operand(hidden_CD, packed, is_dot, "hidden").contiguous()
    return _token_logprobs(hidden, packed, vocab_size, target_ids, temperature)[0]


def _token_logprobs(hidden, packed, vocab_size, target_ids, temperature):
    num_rows = hidden.shape[0]
    block_max, block_sum = _vocab_stats(hidden, packed, vocab_size, temperature)
    logprobs, row_max = temperature.new_empty(num_rows), temperature.new_empty(num_rows)
    row_sum = temperature.new_empty(num_rows, dtype=torch.float64)
    library().ls_draw(
        hidden.data_ptr(), packed.data_ptr(), arithmetic(hidden, packed), temperature.data_ptr(), block_max.data_ptr(),
        block_sum.data_ptr(), None, None, None, None, None, target_ids.data_ptr(), logprobs.data_ptr(),
        row_max.data_ptr(), row_sum.data_ptr(), num_rows, vocab_size, hidden.shape[1],
    )  # fmt: skip
    return logprobs, row_max, row_sum


class _TokenLogprobs(torch.autograd.Function):
    """Backward in chunks of rows: the gradient of the logits, which are computed again, then two products."""

    @staticmethod
    def forward(ctx, hidden, packed, vocab_size, target_ids, temperature, master, is_dot):
        hidden = operand(hidden, packed, is_dot, "hidden").contiguous()
        logprobs, row_max, row_sum = _token_logprobs(hidden, packed, vocab_size, target_ids, temperature)
        ctx.save_for_backward(hidden, packed, target_ids, temperature, master, row_max, row_sum)
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        hidden, packed, target_ids, temperature, master, row_max, row_sum = ctx.saved_tensors
        slope = grad / temperature
        rows = (temperature, slope, row_max, -slope / row_sum.float(), target_ids)
        run = _dot_backward if hidden.dtype is torch.bfloat16 else _float_backward
        grad_hidden, grad_master = run(hidden, packed, master, rows, ctx.needs_input_grad[0], ctx.needs_input_grad[5])
        return grad_hidden, None, None, None, None, grad_master, None


def _float_backward(hidden, packed, master, rows, needs_hidden, needs_master):
    weight = master.bfloat16().float() if packed.dtype is torch.bfloat16 else master
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_master = torch.zeros_like(master) if needs_master else None
    for begin in range(0, hidden.shape[0], BACKWARD_ROWS):
        chunk = slice(begin, begin + BACKWARD_ROWS)
        dz = hidden.new_empty(hidden[chunk].shape[0], master.shape[0])
        _logit_gradient(hidden[chunk], packed, master.shape[0], [row[chunk] for row in rows], dz, None, None)
        if needs_hidden:
            torch.mm(dz, weight, out=grad_hidden[chunk])
        if needs_master:
            grad_master.addmm_(dz.T, hidden[chunk])
    return grad_hidden, grad_master


def _dot_backward(hidden, packed, master, rows, needs_hidden, needs_master):
    """As above with the logit gradients, the weight and hidden as bfloat16 and sums in float32."""
    (num_rows, width), vocab_size = hidden.shape, master.shape[0]
    columns = packed_columns(master.bfloat16()) if needs_hidden else None
    grad_hidden = master.new_empty(num_rows, width) if needs_hidden else None
    grad_master = torch.zeros_like(master) if needs_master else None
    for begin in range(0, num_rows, BACKWARD_ROWS):
        chunk = slice(begin, begin + BACKWARD_ROWS)
        num_chunk_rows = hidden[chunk].shape[0]
        dz = hidden.new_empty(num_chunk_rows, vocab_size + vocab_size % 2)
        dz_transposed = hidden.new_empty(vocab_size, num_chunk_rows + num_chunk_rows % 2)
        dz[:, vocab_size:], dz_transposed[:, num_chunk_rows:] = 0, 0
        _logit_gradient(hidden[chunk], packed, vocab_size, [row[chunk] for row in rows], None, dz, dz_transposed)
        if needs_hidden:
            multiply(dz, columns, None, grad_hidden[chunk])
        if needs_master:
            multiply(dz_transposed, packed_columns(hidden[chunk]), grad_master, grad_master)
    return grad_hidden, grad_master


def _logit_gradient(hidden, packed, vocab_size, rows, dz, dz_rounded, dz_transposed):
    temperature, slope, row_max, weight, target_ids = rows
    library().ls_logit_gradient(
        hidden.data_ptr(), packed.data_ptr(), arithmetic(hidden, packed), temperature.data_ptr(), slope.data_ptr(),
        row_max.data_ptr(), weight.data_ptr(), target_ids.data_ptr(), None if dz is None else dz.data_ptr(),
        None if dz_rounded is None else dz_rounded.data_ptr(), vocab_size + vocab_size % 2,
        None if dz_transposed is None else dz_transposed.data_ptr(), hidden.shape[0] + hidden.shape[0] % 2,
        hidden.shape[0], vocab_size, hidden.shape[1],
    )  # fmt: skip
