from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close, assert_same_bits, spread

from kernels import reference
from kernels.library import set_num_threads
from kernels.rotary import MAX_POSITIONS, rotary, rotary_table


@pytest.mark.parametrize(("head_dim", "theta"), [(16, 1e4), (64, 1e5), (80, 1e6), (128, 5e5)])
def test_table_equals_the_reference(head_dim, theta):
    assert_same_bits(rotary_table(1000, head_dim, theta), reference.rotary_table(1000, head_dim, theta))


def test_table_is_the_float32_nearest_to_the_sine_of_the_angle():
    table = rotary_table(4096, 64, 1e5)
    inv_freq = (1.0 / 1e5 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)).float()
    angles = torch.outer(torch.arange(4096).float(), inv_freq).double()
    assert_same_bits(table, torch.cat([angles.cos(), angles.sin()], 1).float())


def test_a_longer_table_begins_with_the_shorter_one():
    table = rotary_table(5000, 64, 1e4)
    for num_threads, num_positions in ((1, 1), (2, 127), (3, 4999)):
        set_num_threads(num_threads)
        assert_same_bits(rotary_table(num_positions, 64, 1e4), table[:num_positions])


@pytest.mark.parametrize(("num_heads", "head_dim"), [(9, 64), (3, 16), (1, 80), (7, 128)])
def test_rotation_equals_the_reference(num_heads, head_dim):
    table = rotary_table(700, head_dim, 1e4)
    x = spread(130, num_heads, head_dim, seed=1)
    positions = torch.randint(0, 700, (130,), generator=torch.Generator().manual_seed(2))
    expected = reference.rotary(x, positions, table)
    for num_threads, num_rows in ((1, 130), (2, 130), (3, 130), (4, 129), (2, 1), (2, 17)):
        set_num_threads(num_threads)
        assert_same_bits(rotary(x[:num_rows], positions[:num_rows], table), expected[:num_rows])


def test_place_and_strides_do_not_show():
    table = rotary_table(40, 16, 1e4)
    fused = spread(30, 7 * 16, seed=3)  # queries, keys and values of a row side by side
    q, k = fused[:, :64].view(30, 4, 16), fused[:, 64:96].view(30, 2, 16)
    positions = torch.arange(5, 35)
    assert_same_bits(rotary(q, positions, table), reference.rotary(q.contiguous(), positions, table))
    assert_same_bits(rotary(k[3:], positions[3:], table), rotary(k.contiguous(), positions, table)[3:])
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(rotary(transposed, positions, table), rotary(q, positions, table))


def test_gradient_turns_back():
    table, positions = rotary_table(40, 16, 1e4), torch.arange(30)
    x, grad = spread(30, 3, 16, seed=4).requires_grad_(), spread(30, 3, 16, seed=5)
    y = rotary(x, positions, table)
    assert_same_bits(y.detach(), rotary(x.detach(), positions, table))
    y.backward(grad)
    exact_x = x.detach().double().requires_grad_()
    cosine, sine = table.double()[positions, None].split(8, dim=2)
    x1, x2 = exact_x.split(8, dim=2)
    torch.cat([x1 * cosine - x2 * sine, x2 * cosine + x1 * sine], 2).backward(grad.double())
    assert_close(x.grad, exact_x.grad, 1e-6)
    assert_same_bits(x.grad, rotary(grad, positions, torch.cat([table[:, :8], -table[:, 8:]], 1)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="exceeds 1048576"):
        rotary_table(MAX_POSITIONS + 1, 16, 1e4)
    with pytest.raises(ValueError, match="float16"):
        rotary(torch.ones(1, 1, 16).half(), torch.zeros(1, dtype=torch.int64), rotary_table(1, 16, 1e4))
