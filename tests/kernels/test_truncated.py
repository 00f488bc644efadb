"""Truncated sampling equals the reference bit for bit, and plain float64 within rounding; draws follow what it says."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_bits, pack, spread
from truncation_cases import id_lists, make_draws, make_options, random_options

from kernels import reference_truncation
from kernels.library import set_num_threads
from kernels.linear import linear
from kernels.logprobs import sample, token_logprobs
from kernels.truncated import MAX_VOCAB_SIZE, DrawOptions, TruncatedDraws, truncated_sample

FIELDS = ("token_ids", "logprobs", "raw_logprobs", "kept_mass", "num_kept", "top_ids", "top_logprobs")


def make_logits(num_rows: int, vocab_size: int, *, seed: int, size: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * size


def coarse(logits: torch.Tensor) -> torch.Tensor:
    """The same in steps of a half: full of ties, and of zeros of both signs."""
    return (logits * 2).round() / 2


def assert_same(a: TruncatedDraws, b: TruncatedDraws) -> None:
    for name in FIELDS:
        assert_same_bits(getattr(a, name), getattr(b, name))


def take(draws: torch.Tensor, options: DrawOptions, columns: list[int]) -> tuple[torch.Tensor, DrawOptions]:
    """Some of the draws, with their options."""

    def lists(these, values=None):
        parts = [slice(these.offsets[i], these.offsets[i + 1]) for i in columns]
        chosen = id_lists([these.ids[part].tolist() for part in parts])
        return chosen if values is None else (chosen, torch.cat([values[part] for part in parts]))

    (seen, counts), (biased, bias) = lists(options.seen, options.counts), lists(options.biased, options.bias)
    return draws[:, columns].contiguous(), DrawOptions(
        numbers=options.numbers[:, columns].contiguous(), seen=seen, counts=counts, biased=biased, bias=bias,
        masked=lists(options.masked), allowed=lists(options.allowed),
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [1, 2, 40, 64, 65, 337, 1500])
@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_draws_equal_the_reference(vocab_size, kind):
    logits = make_logits(9, vocab_size, seed=vocab_size)
    logits = coarse(logits) if kind == "coarse" else logits
    num_draws = 60 if vocab_size > 1000 else 150
    draws = make_draws(num_draws, 9, seed=1 + vocab_size)
    options = random_options(num_draws, vocab_size, seed=2 + vocab_size)
    assert_same(
        truncated_sample(logits, draws, options, num_top=5),
        reference_truncation.truncated_sample(logits, draws, options, num_top=5),
    )


@pytest.mark.parametrize("size", [0.0, 1e-4, 30.0, 400.0])
def test_flat_and_steep_rows_equal_the_reference(size):
    """Flat: one bin and many ties. Steep: a prefix may end where every mass is 0."""
    logits = make_logits(4, 900, seed=3, size=size)
    draws = make_draws(60, 4, seed=4)
    options = random_options(60, 900, seed=5)
    assert_same(
        truncated_sample(logits, draws, options, num_top=3),
        reference_truncation.truncated_sample(logits, draws, options, num_top=3),
    )


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_a_draw_does_not_depend_on_its_batch_or_the_threads(num_threads):
    logits = make_logits(13, 700, seed=6)
    draws, options = make_draws(60, 13, seed=7), random_options(60, 700, seed=8)
    whole = truncated_sample(logits, draws, options, num_top=2)
    set_num_threads(num_threads)
    assert_same(truncated_sample(logits, draws, options, num_top=2), whole)
    for columns in ([i] for i in range(60)):
        one = truncated_sample(logits, *take(draws, options, columns), num_top=2)
        assert_same(one, TruncatedDraws(**{name: getattr(whole, name)[columns] for name in FIELDS}))
    backwards = list(reversed(range(60)))
    turned = truncated_sample(logits, *take(draws, options, backwards), num_top=2)
    assert_same(turned, TruncatedDraws(**{name: getattr(whole, name)[backwards] for name in FIELDS}))


def plain_distribution(logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float):
    """(kept ids, their renormalised log-probabilities, kept mass) by sorting float64 probabilities."""
    probabilities = (logits.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True, stable=True)
    kept = order[probabilities[order] >= min_p * probabilities.max()]
    kept = kept[: top_k or None]
    shares = probabilities[kept] / probabilities[kept].sum()
    kept = kept[shares.cumsum(0) - shares < top_p]
    mass = probabilities[kept].sum()
    return kept, (probabilities[kept] / mass).log(), mass


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(
    ("min_p", "top_k", "top_p"),
    [(0.0, 0, 0.9), (0.0, 0, 0.3), (0.0, 0, 0.999), (0.0, 50, 1.0), (0.05, 0, 1.0), (0.01, 40, 0.95), (0.0, 1, 1.0)],
)
def test_kept_sets_and_logprobs_are_those_of_a_plain_float64_sort(temperature, min_p, top_k, top_p):
    logits = make_logits(12, 3000, seed=9)
    options = make_options(12, temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    draws = make_draws(12, 12, seed=10, greedy_share=0)
    draws[0] = torch.arange(12)
    result = truncated_sample(logits, draws, options, num_top=3000)
    for i in range(12):
        kept, logprobs, mass = plain_distribution(logits[i], temperature, min_p, top_k, top_p)
        num_kept = result.num_kept[i].item()
        assert result.top_ids[i, :num_kept].tolist() == kept.tolist()
        assert (result.top_ids[i, num_kept:] == -1).all()
        assert (result.top_logprobs[i, :num_kept].double() - logprobs).abs().max() < 1e-5
        assert abs(result.kept_mass[i].item() - mass.item()) < 1e-5
        assert result.token_ids[i].item() in kept
        raw = logits[i].double().log_softmax(0)[result.token_ids[i]]
        assert abs(result.raw_logprobs[i].item() - raw.item()) < 1e-5


def test_penalties_are_those_of_their_formula():
    logits = make_logits(1, 500, seed=11)
    seen = {3: 0, 4: 1, 7: 5, 499: 2}
    options = make_options(
        1, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, temperature=0.8, seen=[seen],
        biased=[{7: 4.0, 20: -3.0}],
    )  # fmt: skip
    result = truncated_sample(logits, make_draws(1, 1, seed=12, greedy_share=0), options, num_top=500)
    expected = logits[0].double().clone()
    for i, count in seen.items():
        expected[i] = expected[i] / 1.3 if expected[i] > 0 else expected[i] * 1.3
        expected[i] -= 0.25 * count + 0.5 * (count > 0)
    expected[7] += 4.0
    expected[20] -= 3.0
    logprobs = (expected / 0.8).log_softmax(0)
    assert (result.top_logprobs[0].double() - logprobs[result.top_ids[0]]).abs().max() < 1e-5
    assert result.top_ids[0].tolist() == logprobs.argsort(descending=True).tolist()
    assert result.kept_mass.item() == 1.0


@pytest.mark.parametrize(
    "numbers",
    [
        {"top_p": 0.8},
        {"top_k": 12, "temperature": 1.5},
        {"min_p": 0.1},
        {"temperature": 2.0},
        {"top_k": 30, "top_p": 0.7, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution_they_report(numbers):
    n, vocab_size = 30_000, 200
    logits = make_logits(1, vocab_size, seed=13, size=1.5)
    draws = torch.zeros(5, n, dtype=torch.int64)
    draws[1], draws[2] = 99, torch.arange(n)
    options = make_options(n, **numbers)
    result = truncated_sample(logits, draws, options)
    listed = truncated_sample(logits, draws[:, :1].contiguous(), make_options(1, **numbers), num_top=vocab_size)
    num_kept = listed.num_kept.item()
    expected = listed.top_logprobs[0, :num_kept].double().exp()
    assert abs(expected.sum().item() - 1) < 1e-5
    observed = torch.bincount(result.token_ids, minlength=vocab_size)[listed.top_ids[0, :num_kept]].double()
    assert observed.sum() == n
    is_common = expected * n > 10
    observed = torch.cat([observed[is_common], observed[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]]) * n
    observed, expected = observed[expected > 1e-9], expected[expected > 1e-9]
    assert len(expected) > 5
    chi_square, freedom = ((observed - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5 + 10  # beyond it less than once in 10^5


def test_seed_position_and_index_each_key_the_draw():
    logits, zeros, numbers = make_logits(1, 300, seed=14, size=1.0), torch.zeros(64), torch.arange(64)
    for key in (1, 2, 3):
        draws = torch.zeros(5, 64, dtype=torch.int64)
        draws[key] = numbers
        assert len(truncated_sample(logits, draws, make_options(64, top_p=0.9)).token_ids.unique()) > 16
        draws[key] = zeros
        assert len(truncated_sample(logits, draws, make_options(64, top_p=0.9)).token_ids.unique()) == 1


@pytest.mark.parametrize("vocab_size", [1, 40, 337, 1500])
def test_a_row_that_nothing_changes_has_the_bits_of_the_plain_road(vocab_size):
    hidden, weight = spread(40, 72, seed=15, low=-2, high=2), spread(vocab_size, 72, seed=16, low=-6, high=-1)
    packed, temperature = pack(weight), torch.linspace(0.3, 3.0, 40)
    logits = linear(hidden, packed, vocab_size)
    draws = make_draws(400, 40, seed=17)
    draws[4] = draws[0] % 5 == 0
    temperature[::5] = 1.0
    rows = draws[0]
    for is_plain in (0, 1):
        options = make_options(400, temperature=temperature[rows].double(), is_plain=is_plain)
        result = truncated_sample(logits, draws, options, num_top=1)
        drawn = result.token_ids
        assert_same_bits(result.logprobs, token_logprobs(hidden[rows], packed, vocab_size, drawn, temperature[rows]))
        raw = token_logprobs(hidden[rows], packed, vocab_size, drawn, torch.ones(400))
        assert_same_bits(result.raw_logprobs, raw)
        assert (result.kept_mass == 1.0).all()
        assert (result.num_kept == vocab_size).all()
        assert_same(result, reference_truncation.truncated_sample(logits, draws, options, num_top=1))
    plain, logprobs = sample(hidden, packed, vocab_size, temperature, *draws[:4], draws[4].to(torch.uint8))
    assert torch.equal(plain, drawn)
    assert_same_bits(logprobs, result.logprobs)


def test_ties_go_to_the_lowest_ids():
    logits = torch.zeros(1, 200)
    logits[0, [150, 20, 90]] = 1.0
    draws = make_draws(1, 1, seed=18, greedy_share=0)
    result = truncated_sample(logits, draws, make_options(1, top_k=5), num_top=6)
    assert result.top_ids[0].tolist() == [20, 90, 150, 0, 1, -1]
    greedy = torch.tensor([[0], [0], [0], [0], [1]])
    assert truncated_sample(logits, greedy, make_options(1, seen=[{20: 1}], presence_penalty=2.0)).token_ids == 90


def test_greedy_ignores_truncation_and_reports_the_whole_distribution():
    logits = make_logits(3, 400, seed=19)
    draws = torch.tensor([[0, 1, 2], [0] * 3, [0] * 3, [0] * 3, [1] * 3])
    result = truncated_sample(logits, draws, make_options(3, top_k=2, top_p=0.1, min_p=0.9))
    assert torch.equal(result.token_ids, logits.argmax(1))
    assert_same_bits(result.logprobs, result.raw_logprobs)
    assert (result.num_kept == 400).all()


def test_masks_are_lifted_where_they_would_leave_nothing():
    logits = make_logits(1, 100, seed=20)
    draws = make_draws(1, 1, seed=21)
    options = make_options(1, allowed=[[5, 60]], masked=[[60, 5, 7]])
    assert truncated_sample(logits, draws, options).token_ids.item() in (5, 60)
    options = make_options(1, allowed=[[5, 60]], masked=[[5]])
    assert truncated_sample(logits, draws, options).token_ids.item() == 60


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_distribution_gives_id_0_and_nan(bad):
    logits = make_logits(3, 130, seed=22)
    if bad == float("-inf"):
        logits[1] = bad
    else:
        logits[1, 77] = bad
    draws = make_draws(3, 3, seed=23, greedy_share=0)
    draws[0] = torch.arange(3)
    options = make_options(3, top_p=0.9, top_k=20)
    result = truncated_sample(logits, draws, options, num_top=2)
    assert_same(result, reference_truncation.truncated_sample(logits, draws, options, num_top=2))
    for values in (result.logprobs, result.raw_logprobs, result.kept_mass):
        assert values.isnan().tolist() == [False, True, False]
    assert result.token_ids[1] == 0
    assert result.top_ids[1].tolist() == [-1, -1]


def test_logits_of_minus_infinity_are_never_drawn():
    logits = make_logits(1, 64, seed=24)
    logits[0, ::2] = -torch.inf
    n = 200
    draws = make_draws(n, 1, seed=25)
    options = random_options(n, 64, seed=26)
    result = truncated_sample(logits, draws, options, num_top=4)
    assert_same(result, reference_truncation.truncated_sample(logits, draws, options, num_top=4))
    real = ~result.logprobs.isnan()
    assert (result.token_ids[real] % 2 == 1).all()


def test_mistakes_are_named():
    draws, options = make_draws(1, 1, seed=27), make_options(1)
    with pytest.raises(ValueError, match="logits is"):
        truncated_sample(torch.zeros(1, 4).double(), draws, options)
    with pytest.raises(ValueError, match="must be contiguous"):
        truncated_sample(torch.zeros(4, 2).T, draws, options)
    with pytest.raises(ValueError, match=f"exceeds the {MAX_VOCAB_SIZE}"):
        truncated_sample(torch.zeros(1, 1).expand(1, MAX_VOCAB_SIZE + 1), draws, options)
