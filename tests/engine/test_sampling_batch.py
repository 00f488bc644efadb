"""A step's sampling columns say who draws from which row, and are the same whatever else is in the step."""

from __future__ import annotations

import torch

from engine.request import Request
from engine.sampling_batch import SamplingBatch
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SchedulerOutput


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
        scheduled.append(ScheduledRequest(request=request, start=0, num_tokens=num_tokens, samples=samples))
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
    plan = make_plan((request, 1, True))
    positions = []
    for _ in range(3):
        positions.append(SamplingBatch.from_plan(*plan).draws[2].item())
        request.append_token(1, -0.5, 0)
    assert positions == [0, 1, 2]
