"""Log-probabilities and sampling straight from hidden states; one set of sums serves engine and trainer.

Logits are never written out: a tile of them is reduced to a maximum and a sum of exponentials for each 64 ids of the
vocabulary. The trainer's tile hands over the logit of the target on the way; the engine computes the one tile that
holds the drawn id again, by the same code on tiles of the same shape (docs/numerics.md, "GPU profile").
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import NEGATIVE_INFINITY, exp, log, tile_product, uniform
from kernels.gpu.launch import aligned, launch
from kernels.gpu.linear import check_operands, linear, matmul_float32
from kernels.gpu.tiles import VOCAB_BLOCK, head_tile

BACKWARD_ROWS = 1024  # logits of so many rows exist at once in the backward pass
NUM_WARPS = 8  # of the programs that reduce a row's vocabulary blocks; the order of those sums hangs on it


def vocab_stats(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, temperature_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_max, block_sum), each [T, ceil(V / 64)] float32, of the logits hidden @ weight.T / temperature."""
    return _vocab_stats(hidden_TD, weight_VD, temperature_T, _no_targets(temperature_T))[:2]


def sample(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    temperature_T: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    is_greedy: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token for each entry of `rows`: (token_ids [n] int64, logprobs [n] float32), without the host.

    Args:
        hidden_TD: of the weight's type; several draws may share a row.
        temperature_T: float32, one per row, 1.0 where greedy.
        rows, positions, indices: int64 [n]; row of the draw, its position in the completion, its sample index.
        seeds: int64 [n], the 64 bits of the key. is_greedy: uint8 [n].
    """
    hidden, weight = aligned(hidden_TD), aligned(weight_VD)
    stats = _vocab_stats(hidden, weight, temperature_T, _no_targets(temperature_T))
    row_max, row_sum, _ = _row_totals(*stats)
    block_max, block_sum, _ = stats
    token_ids, logprobs = rows.new_empty(rows.shape[0]), row_max.new_empty(rows.shape[0])
    tile = head_tile(hidden.dtype)
    vocab_size, width = weight.shape
    num_blocks = block_max.shape[1]
    launch(
        _draw_kernel, (rows.shape[0],), hidden, weight, temperature_T, block_max, block_sum, row_max, row_sum,
        rows, seeds, positions, indices, is_greedy, token_ids, logprobs,
        V=vocab_size, D=width, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, VOCAB=VOCAB_BLOCK,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return token_ids, logprobs


def token_logprobs(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: torch.Tensor,
    master: torch.Tensor | None = None,
) -> torch.Tensor:
    """logprobs[C] float32 of target_ids [C] int64 under softmax(hidden @ weight.T / temperature), temperature [C].

    Differentiable in hidden and in `master`, the weight as a float32 tensor [V, D].
    """
    if torch.is_grad_enabled() and (hidden_CD.requires_grad or (master is not None and master.requires_grad)):
        return _TokenLogprobs.apply(hidden_CD, weight_VD, target_ids, temperature, master)
    return _token_logprobs(hidden_CD, weight_VD, target_ids, temperature)[0]


def _token_logprobs(hidden, weight, target_ids, temperature):
    """(logprobs, row_max, row_sum), the latter two being what the backward pass needs."""
    row_max, row_sum, logprobs = _row_totals(*_vocab_stats(hidden, weight, temperature, target_ids))
    return logprobs, row_max, row_sum


def _no_targets(temperature: torch.Tensor) -> torch.Tensor:
    """Targets of rows that are to be drawn from: so the engine runs the very kernels of the trainer."""
    return torch.full(temperature.shape, -1, dtype=torch.int64, device=temperature.device)


def _vocab_stats(hidden, weight, temperature, target_ids):
    """(block_max, block_sum, the logits of the targets; undefined where a target is -1)."""
    check_operands(hidden, weight)
    hidden, weight = aligned(hidden), aligned(weight)
    num_rows, width = hidden.shape
    vocab_size = weight.shape[0]
    tile = head_tile(hidden.dtype)
    block_max = hidden.new_empty(num_rows, triton.cdiv(vocab_size, VOCAB_BLOCK), dtype=torch.float32)
    block_sum = torch.empty_like(block_max)
    target_logits = hidden.new_empty(num_rows, dtype=torch.float32)
    num_row_tiles = triton.cdiv(num_rows, tile.rows)
    launch(
        _vocab_stats_kernel, (num_row_tiles * triton.cdiv(vocab_size, tile.columns),), hidden, weight, temperature,
        target_ids, block_max, block_sum, target_logits, num_rows,
        V=vocab_size, D=width, NUM_BLOCKS=block_max.shape[1], BLOCK_M=tile.rows, BLOCK_N=tile.columns,
        BLOCK_K=tile.depth, VOCAB=VOCAB_BLOCK, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return block_max, block_sum, target_logits


def _row_totals(block_max, block_sum, target_logits):
    """(row_max float32, row_sum float64, logprobs of the targets), each [T]."""
    num_rows, num_blocks = block_max.shape
    row_max = block_max.new_empty(num_rows)
    row_sum = block_max.new_empty(num_rows, dtype=torch.float64)
    logprobs = torch.empty_like(row_max)
    launch(
        _row_totals_kernel, (num_rows,), block_max, block_sum, target_logits, row_max, row_sum, logprobs,
        NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=NUM_WARPS,
    )  # fmt: skip
    return row_max, row_sum, logprobs


@triton.jit(do_not_specialize=["num_rows"])
def _vocab_stats_kernel(
    hidden, weight, temperature, target_ids, block_max, block_sum, target_logits, num_rows,
    V: tl.constexpr, D: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(num_rows, BLOCK_M)  # neighbours share the weights of their ids, through L2
    row_tile, id_tile = tl.program_id(0) % num_row_tiles, tl.program_id(0) // num_row_tiles
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = id_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row = rows < num_rows
    heat = tl.load(temperature + rows, mask=has_row, other=1.0)
    z = _logits(hidden, weight, rows, has_row, ids, heat, V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    target = tl.load(target_ids + rows, mask=has_row, other=-1)
    logit = tl.sum(tl.where(ids[None, :] == target[:, None], z, 0.0), axis=1)
    tl.store(target_logits + rows, logit, mask=(target >= id_tile * BLOCK_N) & (target < (id_tile + 1) * BLOCK_N))
    z = tl.where((ids < V)[None, :], z, NEGATIVE_INFINITY)
    z = tl.reshape(z, (BLOCK_M, BLOCK_N // VOCAB, VOCAB))
    highest = tl.max(z, axis=2)
    total = tl.sum(exp(z - highest[:, :, None]), axis=2)
    blocks = id_tile * (BLOCK_N // VOCAB) + tl.arange(0, BLOCK_N // VOCAB)
    place = rows.to(tl.int64)[:, None] * NUM_BLOCKS + blocks[None, :]
    has = has_row[:, None] & (blocks < NUM_BLOCKS)[None, :]
    tl.store(block_max + place, highest, mask=has)
    tl.store(block_sum + place, total, mask=has)


@triton.jit
def _row_totals_kernel(
    block_max, block_sum, target_logits, row_max, row_sum, logprobs, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0)
    highest, masses = _masses(block_max, block_sum, row, NUM_BLOCKS, BLOCKS)
    top = tl.max(highest, axis=0)
    total = tl.sum(masses, axis=0)
    tl.store(row_max + row, top)
    tl.store(row_sum + row, total)
    tl.store(logprobs + row, _logprob(tl.load(target_logits + row), top, total))


@triton.jit
def _draw_kernel(
    hidden, weight, temperature, block_max, block_sum, row_max, row_sum, rows, seeds, positions, indices, is_greedy,
    token_ids, logprobs,
    V: tl.constexpr, D: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VOCAB: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0)
    row = tl.load(rows + draw)
    top, total = tl.load(row_max + row), tl.load(row_sum + row)
    greedy = tl.load(is_greedy + draw) != 0
    u = uniform(tl.load(seeds + draw), tl.load(positions + draw), tl.load(indices + draw))
    block, before = _pick_block(block_max, block_sum, row, top, u * total, greedy, NUM_BLOCKS, BLOCKS)

    first = tl.arange(0, BLOCK_M)
    ids = block * VOCAB // BLOCK_N * BLOCK_N + tl.arange(0, BLOCK_N)
    heat = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(temperature + row)
    z = _logits(hidden, weight, first * 0 + row, first == 0, ids, heat, V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    z = tl.sum(tl.where((first == 0)[:, None], z, 0.0), axis=0)
    z = tl.where((ids // VOCAB == block) & (ids < V), z, NEGATIVE_INFINITY)

    token = _pick_id(z, ids, top, before, u * total, greedy, V)
    logit = tl.sum(tl.where(ids == token, z, 0.0), axis=0)
    tl.store(token_ids + draw, token.to(tl.int64))
    tl.store(logprobs + draw, _logprob(logit, top, total))


@triton.jit
def _logits(
    hidden, weight, rows, has_row, ids, heat, V: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of logits over temperature, [BLOCK_M, BLOCK_N] float32."""
    x_rows, weight_rows = hidden + rows.to(tl.int64) * D, weight + ids.to(tl.int64) * D
    z = tile_product(x_rows, has_row, weight_rows, ids < V, D, BLOCK_M, BLOCK_N, BLOCK_K)
    return tl.math.div_rn(z, tl.broadcast_to(heat[:, None], (BLOCK_M, BLOCK_N)))


@triton.jit
def _masses(block_max, block_sum, row, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """(maxima, masses relative to the largest of them in float64) of a row's vocabulary blocks."""
    b = tl.arange(0, BLOCKS)
    place = tl.cast(row, tl.int64) * NUM_BLOCKS + b
    highest = tl.load(block_max + place, mask=b < NUM_BLOCKS, other=NEGATIVE_INFINITY)
    sums = tl.load(block_sum + place, mask=b < NUM_BLOCKS, other=0.0)
    return highest, sums.to(tl.float64) * exp(highest - tl.max(highest, axis=0)).to(tl.float64)


@triton.jit
def _pick_block(block_max, block_sum, row, top, target, greedy, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr):
    """(block of the draw, the running total of masses before it)."""
    highest, masses = _masses(block_max, block_sum, row, NUM_BLOCKS, BLOCKS)
    b = tl.arange(0, BLOCKS)
    totals = tl.cumsum(masses, axis=0)
    passing = tl.min(tl.where(totals > target, b, BLOCKS), axis=0)
    last = tl.max(tl.where(masses > 0, b, 0), axis=0)  # where rounding leaves no block that passes
    best = tl.min(tl.where((highest == top) & (b < NUM_BLOCKS), b, NUM_BLOCKS - 1), axis=0)
    block = tl.where(greedy, best, tl.where(passing < NUM_BLOCKS, passing, last))
    return block, tl.sum(tl.where(b == block - 1, totals, 0.0), axis=0)


@triton.jit
def _pick_id(z, ids, top, before, target, greedy, V: tl.constexpr):
    """The id drawn among those of a block, whose logits z are -inf elsewhere."""
    highest = tl.max(z, axis=0)
    e = exp(z - highest)
    scale = exp(tl.full(z.shape, 0.0, tl.float32) + (highest - top)).to(tl.float64)
    totals = before + tl.cumsum(e.to(tl.float64) * scale, axis=0)
    passing = tl.min(tl.where((totals > target) & (e > 0), ids, V), axis=0)
    last = tl.max(tl.where(e > 0, ids, 0), axis=0)
    best = tl.min(tl.where(z == highest, ids, V - 1), axis=0)
    return tl.where(greedy, best, tl.where(passing < V, passing, last))


@triton.jit
def _logprob(logit, top, total):
    """(z - M) - log(C); NaN where C is not finite."""
    is_finite = total < float("inf")
    value = (logit - top) - log(tl.where(is_finite, total, 1.0)).to(tl.float32)
    return tl.where(is_finite, value, float("nan"))


class _TokenLogprobs(torch.autograd.Function):
    """Backward in chunks of rows: logits again, softmax in place, two products of the weight's type."""

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, master):
        logprobs, row_max, row_sum = _token_logprobs(hidden, weight, target_ids, temperature)
        ctx.save_for_backward(hidden, weight, target_ids, temperature, row_max, row_sum)
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target_ids, temperature, row_max, row_sum = ctx.saved_tensors
        needs_hidden, needs_master = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_master = weight.new_zeros(weight.shape, dtype=torch.float32) if needs_master else None
        slope = grad / temperature
        for begin in range(0, hidden.shape[0], BACKWARD_ROWS):
            chunk = slice(begin, begin + BACKWARD_ROWS)
            dz = linear(hidden[chunk], weight, out_dtype=torch.float32)
            dz.div_(temperature[chunk, None]).sub_(row_max[chunk, None]).exp_()
            dz.mul_((-slope[chunk] / row_sum[chunk].float())[:, None])
            dz.scatter_add_(1, target_ids[chunk, None], slope[chunk, None])  # one place per row: no race
            dz = dz.to(weight.dtype)
            if needs_hidden:
                grad_hidden[chunk] = matmul_float32(dz, weight).to(hidden.dtype)
            if needs_master:
                grad_master += matmul_float32(dz.T, hidden[chunk])
        return grad_hidden, None, None, None, grad_master
