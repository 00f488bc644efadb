"""A step's sampling columns say who draws from which row, and are the same whatever else is in the step."""

from __future__ import annotations

import torch

from engine.logits_batch import MAX_LOGITS_ROWS
from engine.request import Request
from engine.sampling_batch import SamplingBatch
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SchedulerOutput
from kernels.truncated import NUMBERS


def make_group(num_prompt_tokens: int = 3, seed: int = 0, num_drawn: int = 0, **params) -> Request:
    leader = Request.create_group(
        request_id="r", prompt_token_ids=range(num_prompt_tokens), params=SamplingParams(**params), seed=seed
    )
    for sample in (leader, *leader.siblings):
        sample.token_ids += [7] * num_drawn
    return leader


def make_plan(*entries: tuple[Request, int, bool]) -> tuple[SchedulerOutput, list[int]]:
    """(plan, cu_seqlens) of (request, number of rows, whether it draws)."""
    scheduled, cu_seqlens = [], [0]
    for request, num_tokens, is_complete in entries:
        samples = (request, *request.siblings) if is_complete else ()
        start = request.num_tokens - num_tokens if is_complete else 0
        scheduled.append(ScheduledRequest(request=request, start=start, num_tokens=num_tokens, samples=samples))
        cu_seqlens.append(cu_seqlens[-1] + num_tokens)
    return SchedulerOutput(scheduled=scheduled, block_copies=[], num_scheduled_tokens=cu_seqlens[-1]), cu_seqlens


def test_columns_name_row_seed_position_index_and_greedy():
    plan = make_plan(
        (make_group(seed=5, num_drawn=4, temperature=0.7), 1, True),
        (make_group(num_prompt_tokens=9), 4, False),
        (make_group(seed=2**64 - 1, n=3), 3, True),
        (make_group(seed=2**63, temperature=0.0), 2, True),
    )
    batch = SamplingBatch.from_plan(*plan)
    assert batch.rows.tolist() == [0, 7, 9]
    assert torch.equal(batch.temperature, torch.tensor([0.7, 1.0, 1.0]))
    row, seed, position, index, is_greedy = batch.draws.tolist()
    assert row == [0, 1, 1, 1, 2]
    assert seed == [5, -1, -1, -1, -(2**63)]
    assert position == [4, 0, 0, 0, 0]
    assert index == [0, 0, 1, 2, 0]
    assert is_greedy == [0, 0, 0, 0, 1]


def test_a_step_in_which_nobody_draws_has_no_columns():
    batch = SamplingBatch.from_plan(*make_plan((make_group(num_prompt_tokens=9), 4, False)))
    assert (batch.rows.numel(), batch.temperature.numel(), batch.draws.shape) == (0, 0, (5, 0))


def test_positions_follow_the_completion():
    request = make_group()
    positions = []
    for _ in range(3):
        plan = make_plan((request, 1, True))
        positions.append(SamplingBatch.from_plan(*plan).draws[2].item())
        request.append_token(1, -0.5, 0)
    assert positions == [0, 1, 2]


def test_each_sample_takes_the_road_of_its_own_parameters():
    plan = make_plan(
        (make_group(seed=1, num_drawn=4, top_p=0.5, temperature=0.7), 1, True),
        (make_group(seed=2, num_drawn=2), 1, True),
        (make_group(seed=3, n=2, top_k=3, logprobs=4), 3, True),
        (make_group(num_prompt_tokens=9, top_k=3), 2, False),
        (make_group(seed=4, logprobs=5), 1, True),
    )
    batch = SamplingBatch.from_plan(*plan)
    assert batch.num_samples == 5
    assert batch.rows.tolist() == [1]
    assert list(batch.plain_places) == [1]
    assert batch.draws.tolist() == [[0], [2], [2], [0], [0]]
    assert batch.draws.is_contiguous()
    (logits,) = batch.logits_batches()
    assert logits.rows.tolist() == [0, 4, 7]
    assert logits.places == [0, 2, 3, 4]
    assert logits.num_top == [0, 4, 4, 5]
    assert logits.draws.tolist() == [[0, 1, 1, 2], [1, 3, 3, 4], [4, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert logits.draws.is_contiguous()
    numbers = dict(zip(NUMBERS, logits.options.numbers.tolist(), strict=True))
    assert numbers["temperature"] == [0.7, 1.0, 1.0, 1.0]
    assert numbers["top_p"] == [0.5, 1.0, 1.0, 1.0]
    assert numbers["top_k"] == [0.0, 3.0, 3.0, 0.0]
    assert numbers["is_plain"] == [0.0, 0.0, 0.0, 1.0]


def test_many_rows_of_logits_come_in_parts():
    plan = make_plan(*[(make_group(seed=i, n=2, top_p=0.5), 1, True) for i in range(MAX_LOGITS_ROWS + 3)])
    batch = SamplingBatch.from_plan(*plan)
    assert [part.rows.numel() for part in batch.logits_batches()] == [MAX_LOGITS_ROWS, 3]
    first, last = batch.logits_batches()
    assert first.places + last.places == list(range(2 * MAX_LOGITS_ROWS + 6))
    assert last.rows.tolist() == [MAX_LOGITS_ROWS, MAX_LOGITS_ROWS + 1, MAX_LOGITS_ROWS + 2]
    assert last.draws[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.rows.numel() == 0


def test_lists_of_ids_go_with_their_draw():
    biased = make_group(logit_bias={9: 1.5, 4: -2.0})
    allowed = make_group(allowed_token_ids=[6, 5], presence_penalty=1.0, num_drawn=2)
    stopped = make_group(min_tokens=2, stop_token_ids=[8])
    plan = make_plan((biased, 1, True), (allowed, 1, True), (stopped, 1, True))
    (logits,) = SamplingBatch.from_plan(*plan).logits_batches()
    options = logits.options
    assert (options.biased.offsets.tolist(), options.biased.ids.tolist()) == ([0, 2, 2, 2], [4, 9])
    assert options.bias.tolist() == [-2.0, 1.5]
    assert (options.allowed.offsets.tolist(), options.allowed.ids.tolist()) == ([0, 0, 2, 2], [5, 6])
    assert (options.masked.offsets.tolist(), options.masked.ids.tolist()) == ([0, 0, 0, 1], [8])
    assert (options.seen.offsets.tolist(), options.seen.ids.tolist()) == ([0, 0, 4, 4], [0, 1, 2, 7])
    assert options.counts.tolist() == [0, 0, 0, 2]
