"""The kernel fingerprint: one hash of all that fixes the bits, by which engine and trainer tell that they agree."""

from __future__ import annotations

import functools
import hashlib
import math
import platform
from collections.abc import Iterator

import numpy as np
import torch

from kernels import reference
from kernels.activation import silu_and_mul
from kernels.attention import MAX_HEAD_DIM, PackedPlan, kv_store, packed_attention, paged_attention
from kernels.library import instruction_set
from kernels.linear import PANEL, embedding, linear, pack_rows, packed_shape
from kernels.logprobs import sample, token_logprobs, vocab_stats
from kernels.profiles import Profile, get_profile
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import MAX_POSITIONS, rotary, rotary_table
from kernels.truncated import DrawOptions, IdLists, truncated_sample

CONTRACT_VERSION = 2  # of docs/numerics.md; a change that moves a bit raises it
SELF_TEST_DIGESTS = {  # by profile; the same on every processor and in every build of the kernels
    "float32": "21cb5a3c587fa52bd3128f6466bd7f4c",
    "bfloat16": "e200378c9acdfee4008b9722b130943f",
    "bfloat16-dot": "faaf5ed3f1d7351d0c80039ef7cb55ce",
}
SELF_TEST_OPTIONS = (  # in the order of kernels.truncated.NUMBERS: off, on, on for draws divisible by
    (1.0, 0.7, 2),
    (1.0, 1.3, 3),
    (0.0, 0.4, 4),
    (0.0, 0.6, 5),
    (0.0, 0.05, 6),
    (0, 20, 7),
    (1.0, 0.9, 4),
    (0, 1, 11),
)


@functools.cache
def fingerprint(profile: str = "float32") -> str:
    """Hex hash of a numerics profile: contract version, constants, KV dtype and what the self-test computed here.

    Equal fingerprints mean equal bits. Threads and the instruction set are no part of it, since they do not show.

    Raises:
        ValueError: the profile is not known.
        RuntimeError: this machine does not compute what the profile says (see `self_test`).
    """
    rounding = get_profile(profile)
    constants = (
        PANEL, reference.K_BLOCK, reference.MAX_SEGMENTS, reference.KEY_CHUNK, reference.VOCAB_BLOCK, MAX_HEAD_DIM,
        MAX_POSITIONS,
    )  # fmt: skip
    kv_dtype = str(rounding.kv_dtype).removeprefix("torch.")
    facts = ("lockstep", CONTRACT_VERSION, profile, kv_dtype, constants, _checked_digest(profile))
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def self_test(profile: str = "float32") -> None:
    """Runs every kernel on fixed inputs, in a few milliseconds, and compares all output bits with the recorded digest.

    Raises RuntimeError when they differ: on this machine the compiler or the processor breaks the contract.
    """
    _checked_digest(profile)


def self_test_digest(profile: str = "float32") -> str:
    """Hex digest of what the kernels of a profile compute from fixed inputs, under the threads and build in force."""
    digest = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for output in _outputs(get_profile(profile)):
            digest.update(output.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checked_digest(profile: str) -> str:
    expected, got = SELF_TEST_DIGESTS[profile], self_test_digest(profile)
    if got != expected:
        raise RuntimeError(
            f"the kernels of profile {profile} do not give the recorded bits on {platform.node()} "
            f"({platform.machine()}, instruction set {instruction_set()}): expected {expected}, got {got}. "
            "Rollouts from here would match no trainer; please report the processor and the compiler's version"
        )
    return got


def _outputs(profile: Profile) -> Iterator[torch.Tensor]:
    """What each kernel makes of its inputs: ragged widths, several trees, two chunks of keys, every way to sample."""
    for width, num_outputs in ((72, 70), (576, 65), (2048, 16)):
        x, weight, bias = (
            _numbers(7, width, seed=1),
            _numbers(num_outputs, width, seed=2),
            _numbers(num_outputs, seed=3),
        )
        yield linear(x, _packed(weight, profile), num_outputs, bias, is_dot=profile.is_dot)
    x, delta, weight = _numbers(60, 77, seed=4), _numbers(60, 77, seed=5), _numbers(77, seed=6)
    yield embedding(torch.tensor([3, 64, 0]), _packed(_numbers(66, 20, seed=7), profile))
    yield rms_norm(x, weight, 1e-5)
    yield from add_rms_norm(x, delta, weight, 1e-6)
    yield silu_and_mul(_numbers(5, 2 * 77, seed=8, low=-3, high=7))
    table = rotary_table(300, 32, 1e5)
    yield table
    yield rotary(_numbers(5, 3, 32, seed=9), torch.tensor([0, 1, 77, 256, 299]), table)
    yield from _attention_outputs(profile)
    yield from _logprob_outputs(profile)
    yield from _truncated_outputs()


def _attention_outputs(profile: Profile) -> Iterator[torch.Tensor]:
    q, scale = _numbers(24, 6, 80, seed=10, low=-3, high=1), 1 / math.sqrt(80)
    k, v = _numbers(280, 2, 80, seed=11, low=-3, high=1), _numbers(280, 2, 80, seed=12)
    keys = torch.full((20, 2, 80, 16), math.nan, dtype=profile.kv_dtype)
    values = torch.full((20, 2, 16, 80), math.nan, dtype=profile.kv_dtype)
    table = torch.arange(18) * 7 % 19
    kv_store(k, v, keys, values, table[torch.arange(280) // 16] * 16 + torch.arange(280) % 16)
    tables = table.int().expand(3, 18).contiguous()  # one sequence at three of its lengths
    starts, lengths = torch.tensor([0, 11, 23, 24]).int(), torch.tensor([11, 262, 280]).int()
    for window in (0, 100):
        yield paged_attention(q, keys, values, tables, starts, lengths, scale, window)
    plan = PackedPlan([(0, 10, -1), (10, 19, 0), (19, 20, 0), (20, 24, -1)], kv_dtype=profile.kv_dtype)
    yield packed_attention(q, k[:24], v[:24], plan, scale)


def _logprob_outputs(profile: Profile) -> Iterator[torch.Tensor]:
    hidden, weight = _numbers(5, 72, seed=13, low=-3, high=2), _numbers(200, 72, seed=14, low=-4, high=0)
    temperature, is_dot = torch.tensor([1.0, 0.7, 2.0, 1.0, 30.0], dtype=torch.float32), profile.is_dot
    head = hidden, _packed(weight, profile), 200
    yield from vocab_stats(*head, temperature, is_dot)
    number = torch.arange(40)
    is_greedy = (number % 5 == 3).to(torch.uint8)
    draws = number % 5, number << 40, number * 3, number // 20, is_greedy
    yield from sample(*head, temperature, *draws, is_dot)
    yield token_logprobs(*head, torch.tensor([0, 63, 64, 199, 128]), temperature, is_dot=is_dot)


def _truncated_outputs() -> Iterator[torch.Tensor]:
    """Sixty draws from three rows; every option is off for some of them, in its own rhythm."""
    number, settings = torch.arange(60), torch.tensor(SELF_TEST_OPTIONS, dtype=torch.float64)
    numbers = torch.where(number % settings[:, 2:3] == 0, settings[:, 1:2], settings[:, 0:1])
    three = IdLists(offsets=3 * torch.arange(61), ids=torch.tensor([5, 70, 199], dtype=torch.int32).repeat(60))
    none = IdLists(offsets=torch.zeros(61, dtype=torch.int64), ids=torch.empty(0, dtype=torch.int32))
    counts, bias = (torch.arange(180) % 4).int(), _numbers(180, seed=16, low=-3, high=2)
    options = DrawOptions(
        numbers=numbers.contiguous(), seen=three, counts=counts, biased=three, bias=bias, masked=none, allowed=none
    )
    draws = torch.stack([number % 3, number << 40, number * 3, number // 20, (number % 7 == 3).long()])
    result = truncated_sample(_numbers(3, 200, seed=15, low=-4, high=3), draws, options, num_top=3)
    yield from (result.token_ids, result.logprobs, result.raw_logprobs, result.kept_mass, result.num_kept)
    yield from (result.top_ids, result.top_logprobs)


def _numbers(*shape: int, seed: int, low: int = -5, high: int = 5) -> torch.Tensor:
    """Float32 of either sign, any mantissa and exponents in [low, high), by integer arithmetic alone (splitmix64)."""
    x = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    exponent = np.uint64(127 + low) + (x >> np.uint64(40)) % np.uint64(high - low)
    words = (x & np.uint64(0x807FFFFF)) | (exponent << np.uint64(23))
    return torch.from_numpy(words.astype(np.uint32).view(np.float32).reshape(shape))


def _packed(weight: torch.Tensor, profile: Profile) -> torch.Tensor:
    dtype = profile.weight_dtype
    packed = torch.zeros(packed_shape(*weight.shape, dtype), dtype=dtype)
    pack_rows(packed, weight)
    return packed
