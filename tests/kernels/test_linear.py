from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_rows_do_not_depend_on_their_number,
    assert_same_bits,
    num_different,
    pack,
    spread,
)

from kernels import reference
from kernels.library import set_num_threads
from kernels.linear import embedding, linear, pack_rows, packed_shape, unpack_rows

SHAPES = [(576, 200), (200, 65), (72, 70)]  # K: whole blocks and a half one; a ragged block; less than one block


@pytest.mark.parametrize(("width", "num_outputs"), SHAPES)
def test_every_number_of_rows_equals_the_reference(width, num_outputs):
    x, weight, bias = spread(130, width, seed=1), spread(num_outputs, width, seed=2), spread(num_outputs, seed=3)
    packed = pack(weight)
    expected = reference.linear(x, weight, bias)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, num_outputs, bias), x, expected)


@pytest.mark.parametrize("width", [1, 128, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072])
def test_every_number_of_segments_equals_the_reference(width):
    x, weight = spread(7, width, seed=4), spread(70, width, seed=5)
    packed = pack(weight)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, 70), x, reference.linear(x, weight))


@pytest.mark.parametrize(("constant", "other"), [("K_BLOCK", 64), ("K_BLOCK", 256), ("MAX_SEGMENTS", None)])
def test_another_order_of_summation_shows_in_the_bits(monkeypatch, constant, other):
    x, weight = spread(7, 2048, seed=4), spread(70, 2048, seed=5)
    y = linear(x, pack(weight), 70)
    if constant == "MAX_SEGMENTS":
        monkeypatch.setattr(reference, "num_segments", lambda width: 1)
    else:
        monkeypatch.setattr(reference, constant, other)
        monkeypatch.setattr(reference, "num_segments", lambda width: 8)
    assert num_different(y, reference.linear(x, weight)) > y.numel() // 4


@pytest.mark.parametrize("width", [576, 2048])
def test_torch_linear_would_not_pass(width):
    x, weight = spread(33, width, seed=6), spread(70, width, seed=7)
    packed, expected = pack(weight), reference.linear(x, weight)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, 70), x, expected)
    with pytest.raises(AssertionError, match="differ in bits"):
        assert_rows_do_not_depend_on_their_number(lambda rows: torch.nn.functional.linear(rows, weight), x, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_threads_do_not_show(num_threads):
    set_num_threads(num_threads)
    x, weight = spread(61, 576, seed=8), spread(777, 576, seed=9)
    packed, expected = pack(weight), reference.linear(x[:5], weight)
    for num_rows in (5, 6, 13, 61):
        assert_same_bits(linear(x[:num_rows], packed, 777)[:5], expected)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("width", "num_outputs"), [(576, 960), (576, 3072), (1536, 576)])
def test_every_number_of_rows_up_to_300_in_a_models_shapes(width, num_outputs, num_threads):
    x, weight = spread(300, width, seed=30), spread(num_outputs, width, seed=31)
    packed = pack(weight)
    expected = linear(x, packed, num_outputs)
    assert_same_bits(expected[::43], reference.linear(x[::43], weight))
    set_num_threads(num_threads)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, num_outputs), x, expected)


def test_place_neighbours_and_strides_do_not_show():
    x, weight = spread(40, 200, seed=10), spread(130, 200, seed=11)
    packed = pack(weight)
    y = linear(x, packed, 130)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(12))
    assert_same_bits(linear(x[order], packed, 130), y[order])
    for first in (1, 3, 6, 17):
        assert_same_bits(linear(x[first:], packed, 130), y[first:])
    wide = torch.full((40, 219), float("nan"))
    wide[:, 7:207] = x
    assert_same_bits(linear(wide[:, 7:207], packed, 130), y)
    assert_same_bits(linear(x.T.contiguous().T, packed, 130), y)
    assert_same_bits(linear(x[3:4].expand(9, 200), packed, 130), y[3:4].expand(9, 130))


def test_signed_zeros_and_subnormals_follow_ieee():
    x = torch.zeros(6, 72)
    x[1], x[2, ::2] = -0.0, 1e-30
    x[3], x[4] = 1e-20, spread(72, seed=13) * 1e-35
    weight = spread(70, 72, seed=14) * 1e-12
    weight[1], weight[2] = -0.0, 1e-21
    y = linear(x, pack(weight), 70)
    assert_same_bits(y, reference.linear(x, weight))
    assert ((y != 0) & (y.abs() < torch.finfo(torch.float32).tiny)).any()


def test_the_callers_denormal_mode_does_not_show():
    x, packed = torch.full((200, 64), 1e-20), pack(torch.full((640, 64), 1e-20))
    expected = reference.linear(x[:1], torch.full((1, 64), 1e-20)).expand(200, 640)
    assert torch.set_flush_denormal(True)
    try:
        for num_threads in (1, 2):
            set_num_threads(num_threads)
            for _ in range(5):
                assert_same_bits(linear(x, packed, 640), expected)
        flushed = torch.full((4,), 1e-20) * 1e-20  # and torch finds the mode it had set
    finally:
        torch.set_flush_denormal(False)
    assert (flushed == 0).all()


def test_the_default_dtype_does_not_show():
    x, weight = spread(9, 72, seed=15), spread(70, 72, seed=16)
    packed, expected = pack(weight), reference.linear(x, weight)
    torch.set_default_dtype(torch.bfloat16)
    try:
        y = linear(x, packed, 70)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(y, expected)


def test_no_rows_give_no_rows():
    assert linear(torch.empty(0, 72), pack(torch.ones(70, 72)), 70).shape == (0, 70)
    assert embedding(torch.empty(0, dtype=torch.int64), pack(torch.ones(70, 72))).shape == (0, 72)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_packing_keeps_every_row(num_threads):
    set_num_threads(num_threads)
    weight = spread(333, 50, seed=17)
    packed = torch.full(packed_shape(333, 50), -1.0)
    for first, end in ((0, 37), (37, 200), (200, 201), (201, 333)):
        pack_rows(packed, weight[first:end], first)
        assert_same_bits(unpack_rows(packed, 0, end), weight[:end])
    pack_rows(packed, weight[:70], 100)  # in the middle: neighbours stay
    assert_same_bits(unpack_rows(packed, 0, 333), torch.cat([weight[:100], weight[:70], weight[170:]]))
    assert (packed[-1, :, 333 % 64 :] == -1.0).all()
    assert_same_bits(packed[0].T[:64], unpack_rows(packed, 0, 64))


def test_embedding_is_rows_of_the_weight():
    weight = spread(333, 50, seed=18)
    ids = torch.randint(0, 333, (77,), generator=torch.Generator().manual_seed(19))
    assert_same_bits(embedding(ids, pack(weight)), reference.embedding(ids, weight))


def test_gradients_are_those_of_the_product():
    x, weight, bias, grad = (
        spread(33, 72, seed=20),
        spread(70, 72, seed=21),
        spread(70, seed=22),
        spread(33, 70, seed=23),
    )
    exact_inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    torch.nn.functional.linear(*exact_inputs).backward(grad.double())

    def gradients():
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        linear(inputs[0], pack(weight), 70, inputs[2], master=inputs[1]).backward(grad)
        return [t.grad for t in inputs]

    first = gradients()
    for actual, exact in zip(first, exact_inputs):
        assert_close(actual, exact.grad, 1e-6)
    set_num_threads(3)
    for once, again in zip(first, gradients()):
        assert_same_bits(once, again)


def test_embedding_gradient_adds_up_repeated_ids():
    weight, ids = spread(70, 16, seed=24).requires_grad_(), torch.tensor([3, 5, 3, 69, 3])
    grad = spread(5, 16, seed=25)
    embedding(ids, pack(weight), master=weight).backward(grad)
    expected = torch.zeros(70, 16).double().index_add(0, ids, grad.double())
    assert_close(weight.grad, expected, 1e-6)


def test_the_forward_pass_with_gradients_has_the_same_bits():
    x, weight = spread(9, 72, seed=26), spread(70, 72, seed=27).requires_grad_()
    packed = pack(weight)
    assert_same_bits(linear(x, packed, 70, master=weight).detach(), linear(x, packed, 70))


def test_mistakes_are_named():
    packed = pack(torch.ones(70, 72))
    with pytest.raises(ValueError, match="float64"):
        linear(torch.ones(3, 72, dtype=torch.float64), packed, 70)
    with pytest.raises(ValueError, match="71 columns but the weight has 72"):
        linear(torch.ones(3, 71), packed, 70)
    with pytest.raises(ValueError, match="pass master"):
        linear(torch.ones(3, 72, requires_grad=True), packed, 70)
    with pytest.raises(ValueError, match=r"rows 100\.\.170 exceed the 128 rows"):
        pack_rows(packed, torch.ones(70, 72), 100)
    with pytest.raises(ValueError, match="width 73"):
        pack_rows(packed, torch.ones(70, 73))
    with pytest.raises(ValueError, match="bfloat16"):
        pack_rows(packed, torch.ones(70, 72, dtype=torch.bfloat16))
