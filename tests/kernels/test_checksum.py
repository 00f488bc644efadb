from __future__ import annotations

import pytest
import torch
from kernel_checks import spread

from kernels import reference
from kernels.checksum import combine_digests, digest_and_scan, tensor_digest
from kernels.library import set_num_threads

PIECE = 1 << 18


def test_every_bit_of_every_element_counts():
    x = spread(61, seed=1)
    seen = {tensor_digest(x)}
    for element in range(61):
        for bit in (0, 13, 31):
            changed = x.clone()
            changed.view(torch.int32)[element] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(tensor_digest(changed))
    assert len(seen) == 1 + 61 * 3


@pytest.mark.parametrize("shape", [(0,), (1,), (61,), (8, 12), (PIECE + 11,), (3 * PIECE + 11,)])
def test_digest_equals_the_reference(shape):
    x = spread(*shape, seed=3)
    assert tensor_digest(x) == reference.tensor_digest(x)


def test_places_and_shape_count():
    x = spread(8, 12, seed=2)
    swapped = x.clone()
    swapped[0, 0], swapped[0, 8] = x[0, 8], x[0, 0]  # the same lane
    moved = x.flatten().roll(8).reshape(8, 12)
    assert len({tensor_digest(t) for t in (x, swapped, moved, x.reshape(12, 8), x.flatten(), x[:7])}) == 6


@pytest.mark.parametrize("size", [0, 1, 7, 8, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_threads_do_not_show(size):
    x = torch.arange(size, dtype=torch.float32)
    digests = set()
    for num_threads in (1, 2, 3):
        set_num_threads(num_threads)
        digests.add(tensor_digest(x))
    assert len(digests) == 1
    if size:
        x[-1] += 1
        assert tensor_digest(x) not in digests


@pytest.mark.parametrize("place", [0, 5, PIECE - 1, PIECE, 2 * PIECE + 12])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_non_finite_element_is_found(place, value):
    x = torch.full((2 * PIECE + 13,), 3.4e38)
    assert digest_and_scan(x) == (tensor_digest(x), False)
    x[place] = value
    assert digest_and_scan(x)[1] is True


@pytest.mark.parametrize("size", [0, 5, 61, PIECE + 11, 4 * PIECE + 4096 + 3])
def test_a_copy_on_the_way_has_the_same_bits_and_changes_no_digest(size):
    x = spread(size, seed=4)
    copy = torch.full((size + 16,), 7.0)
    assert digest_and_scan(x, copy_to=copy[8 : 8 + size]) == digest_and_scan(x)
    assert torch.equal(copy[8 : 8 + size].view(torch.int32), x.view(torch.int32))
    assert (copy[:8] == 7).all()
    assert (copy[8 + size :] == 7).all()


def test_combined_digest_depends_on_names_not_on_order():
    a, b = tensor_digest(torch.ones(3)), tensor_digest(torch.ones(4))
    assert combine_digests({"x": a, "y": b}) == combine_digests({"y": b, "x": a})
    assert combine_digests({"x": a, "y": b}) != combine_digests({"x": b, "y": a})
    assert len(a) == len(combine_digests({})) == 16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"torch\.float64"):
        tensor_digest(torch.ones(3).double())
    with pytest.raises(ValueError, match="strides"):
        tensor_digest(torch.ones(3, 4).T)
    with pytest.raises(ValueError, match="copy_to has shape"):
        digest_and_scan(torch.ones(3, 4), copy_to=torch.ones(12))
