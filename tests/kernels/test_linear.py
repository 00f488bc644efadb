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
from kernels.profiles import PROFILES, Profile

SHAPES = [(576, 200), (200, 65), (72, 70)]  # K: whole blocks and a half one; a ragged block; less than one block
every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())


def make_weight(profile: Profile, num_outputs: int, width: int, *, seed: int) -> torch.Tensor:
    return spread(num_outputs, width, seed=seed).to(profile.weight_dtype)


@every_profile
@pytest.mark.parametrize(("width", "num_outputs"), SHAPES)
def test_every_number_of_rows_equals_the_reference(profile, width, num_outputs):
    x, bias = spread(130, width, seed=1), spread(num_outputs, seed=3)
    weight = make_weight(profile, num_outputs, width, seed=2)
    packed, is_dot = pack(weight), profile.is_dot
    expected = reference.linear(x, weight, bias, is_dot)
    assert_rows_do_not_depend_on_their_number(
        lambda rows: linear(rows, packed, num_outputs, bias, is_dot=is_dot), x, expected
    )


@every_profile
@pytest.mark.parametrize("width", [2, 128, 256, 384, 512, 768, 1000, 1024, 1536, 2048, 3072])
def test_every_number_of_segments_equals_the_reference(profile, width):
    x, weight, is_dot = spread(7, width, seed=4), make_weight(profile, 70, width, seed=5), profile.is_dot
    packed, expected = pack(weight), reference.linear(x, weight, is_dot=is_dot)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, 70, is_dot=is_dot), x, expected)


@every_profile
@pytest.mark.parametrize(("constant", "other"), [("K_BLOCK", 64), ("K_BLOCK", 256), ("MAX_SEGMENTS", None)])
def test_another_order_of_summation_shows_in_the_bits(monkeypatch, profile, constant, other):
    x, weight = spread(7, 2048, seed=4), make_weight(profile, 70, 2048, seed=5)
    y = linear(x, pack(weight), 70, is_dot=profile.is_dot)
    if constant == "MAX_SEGMENTS":
        monkeypatch.setattr(reference, "num_segments", lambda width: 1)
    else:
        monkeypatch.setattr(reference, constant, other)
        monkeypatch.setattr(reference, "num_segments", lambda width: 8)
    assert num_different(y, reference.linear(x, weight, is_dot=profile.is_dot)) > y.numel() // 4


@every_profile
@pytest.mark.parametrize("width", [576, 2048])
def test_torch_linear_would_not_pass(profile, width):
    x, weight, is_dot = spread(33, width, seed=6), make_weight(profile, 70, width, seed=7), profile.is_dot
    packed, expected = pack(weight), reference.linear(x, weight, is_dot=is_dot)
    assert_rows_do_not_depend_on_their_number(lambda rows: linear(rows, packed, 70, is_dot=is_dot), x, expected)
    operand = x.bfloat16() if is_dot else x

    def torchs(rows):
        return torch.nn.functional.linear(rows, weight.to(operand.dtype)).float()

    with pytest.raises(AssertionError, match="differ in bits"):
        assert_rows_do_not_depend_on_their_number(torchs, operand, expected)


def test_the_dot_product_flushes_what_its_instruction_flushes():
    smallest = 2.0**-126
    x = torch.tensor([[smallest, 1.0], [smallest / 2, 1.0]])
    weight = torch.tensor([[1.0, 0.0], [1.0, smallest], [2.0**-56, 0.0]]).bfloat16()
    y = linear(x, pack(weight), 3, is_dot=True)
    assert_same_bits(y, reference.linear(x, weight, is_dot=True))
    assert y[0].tolist() == [smallest, 2 * smallest, 0.0]  # 2^-126 * 2^-56 is below the range
    assert y[1].tolist() == [0.0, smallest, 0.0]  # a subnormal operand is zero
    for numerator in range(1, 17):  # 2^-126 - n 2^-154: zero once it rounds below 2^-126 with unbounded exponents
        x = torch.tensor([[2.0**-76 * numerator, smallest]])
        weight = torch.tensor([[-(2.0**-78), 1.0]]).bfloat16()
        y = linear(x, pack(weight), 1, is_dot=True)
        assert_same_bits(y, reference.linear(x, weight, is_dot=True))
        assert y.item() == (smallest if numerator <= 8 else 0.0), numerator


@every_profile
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_threads_do_not_show(profile, num_threads):
    set_num_threads(num_threads)
    x, weight, is_dot = spread(61, 576, seed=8), make_weight(profile, 777, 576, seed=9), profile.is_dot
    packed, expected = pack(weight), reference.linear(x[:5], weight, is_dot=is_dot)
    for num_rows in (5, 6, 13, 61):
        assert_same_bits(linear(x[:num_rows], packed, 777, is_dot=is_dot)[:5], expected)


@pytest.mark.slow
@every_profile
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("width", "num_outputs"), [(576, 960), (576, 3072), (1536, 576)])
def test_every_number_of_rows_up_to_300_in_a_models_shapes(profile, width, num_outputs, num_threads):
    x, weight, is_dot = spread(300, width, seed=30), make_weight(profile, num_outputs, width, seed=31), profile.is_dot
    packed = pack(weight)
    expected = linear(x, packed, num_outputs, is_dot=is_dot)
    assert_same_bits(expected[::43], reference.linear(x[::43], weight, is_dot=is_dot))
    set_num_threads(num_threads)
    assert_rows_do_not_depend_on_their_number(
        lambda rows: linear(rows, packed, num_outputs, is_dot=is_dot), x, expected
    )


@every_profile
def test_place_neighbours_and_strides_do_not_show(profile):
    x, packed = spread(40, 200, seed=10), pack(make_weight(profile, 130, 200, seed=11))

    def run(rows):
        return linear(rows, packed, 130, is_dot=profile.is_dot)

    y = run(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(12))
    assert_same_bits(run(x[order]), y[order])
    for first in (1, 3, 6, 17):
        assert_same_bits(run(x[first:]), y[first:])
    wide = torch.full((40, 219), float("nan"))
    wide[:, 7:207] = x
    assert_same_bits(run(wide[:, 7:207]), y)
    assert_same_bits(run(x.T.contiguous().T), y)
    assert_same_bits(run(x[3:4].expand(9, 200)), y[3:4].expand(9, 130))


@every_profile
def test_signed_zeros_and_subnormals_follow_the_contract(profile):
    x = torch.zeros(6, 72)
    x[1], x[2, ::2] = -0.0, 1e-30
    x[3], x[4] = 1e-20, spread(72, seed=13) * 1e-35
    weight = make_weight(profile, 70, 72, seed=14) * 1e-12
    weight[1], weight[2] = -0.0, 1e-21
    y = linear(x, pack(weight), 70, is_dot=profile.is_dot)
    assert_same_bits(y, reference.linear(x, weight, is_dot=profile.is_dot))
    has_subnormals = ((y != 0) & (y.abs() < torch.finfo(torch.float32).tiny)).any()
    assert has_subnormals != profile.is_dot


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_every_row(dtype, num_threads):
    set_num_threads(num_threads)
    weight = spread(333, 50, seed=17)
    packed = torch.full(packed_shape(333, 50, dtype), -1.0, dtype=dtype)
    stored = weight.to(dtype).float()
    for first, end in ((0, 37), (37, 200), (200, 201), (201, 333)):
        pack_rows(packed, weight[first:end], first)
        assert_same_bits(unpack_rows(packed, 0, end), stored[:end])
    pack_rows(packed, weight[:70], 100)  # in the middle: neighbours stay
    assert_same_bits(unpack_rows(packed, 0, 333), torch.cat([stored[:100], stored[:70], stored[170:]]))
    assert (packed[-1, :, 333 % 64 :] == -1.0).all()
    by_k = packed[0] if dtype is torch.float32 else packed[0].transpose(1, 2).reshape(50, 64)
    assert_same_bits(by_k.T.float(), unpack_rows(packed, 0, 64))


@pytest.mark.parametrize("word", [0x3F808000, 0x3F818000, 0x3F808001, 0xBF80FFFF, 0x7F7FFFFF, 0x00018000, 0x80000001])
def test_rounding_is_to_nearest_even(word):
    value = torch.tensor([word], dtype=torch.int64).to(torch.int32).view(torch.float32)
    packed = pack(value.expand(3, 2).bfloat16())
    pack_rows(packed, value.expand(3, 2))
    assert_same_bits(unpack_rows(packed, 0, 3), value.bfloat16().float().expand(3, 2))
    assert_same_bits(reference.rounded(value), value.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_rows_of_the_weight(dtype):
    weight = spread(333, 50, seed=18).to(dtype)
    ids = torch.randint(0, 333, (77,), generator=torch.Generator().manual_seed(19))
    assert_same_bits(embedding(ids, pack(weight)), reference.embedding(ids, weight))


@every_profile
@pytest.mark.parametrize(
    ("num_rows", "num_outputs"), [(33, 70), (64, 71), (1, 64)]
)  # odd sums over rows and over outputs
def test_gradients_are_those_of_the_product(profile, num_rows, num_outputs):
    x, weight = spread(num_rows, 72, seed=20), spread(num_outputs, 72, seed=21)
    bias, grad = spread(num_outputs, seed=22), spread(num_rows, num_outputs, seed=23)

    def operand(t):  # straight through: the gradient of the rounded operands' product
        return t.bfloat16().double() if profile.is_dot else t.double()

    stored = weight.to(profile.weight_dtype)
    exact_inputs = [t.requires_grad_() for t in (operand(x), stored.double(), bias.double())]
    torch.nn.functional.linear(*exact_inputs[:2]).backward(operand(grad))
    exact_inputs[2].grad = grad.double().sum(0)

    def gradients():
        inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
        linear(inputs[0], pack(stored), num_outputs, inputs[2], inputs[1], profile.is_dot).backward(grad)
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


@every_profile
def test_the_forward_pass_with_gradients_has_the_same_bits(profile):
    x, weight = spread(9, 72, seed=26), spread(70, 72, seed=27).requires_grad_()
    packed = pack(weight.detach().to(profile.weight_dtype))
    trained = linear(x, packed, 70, master=weight, is_dot=profile.is_dot)
    assert_same_bits(trained.detach(), linear(x, packed, 70, is_dot=profile.is_dot))


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
    with pytest.raises(ValueError, match="takes bfloat16 weights"):
        linear(torch.ones(3, 72), packed, 70, is_dot=True)
    with pytest.raises(ValueError, match="width 73 cannot be bfloat16"):
        packed_shape(70, 73, torch.bfloat16)
    with pytest.raises(ValueError, match=r"float16 on cpu: float32 or bfloat16"):
        linear(torch.ones(3, 72), torch.ones(packed_shape(70, 72, torch.bfloat16), dtype=torch.float16), 70)
