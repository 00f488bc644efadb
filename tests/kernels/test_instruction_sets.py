"""One source, several builds with the same bits. Run as a script, it prints its digests."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.build import available_instruction_sets

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from kernel_checks import pack, spread
from truncation_cases import make_draws, random_options

from kernels.activation import silu_and_mul
from kernels.attention import PackedPlan, packed_attention
from kernels.checksum import tensor_digest
from kernels.fingerprint import fingerprint
from kernels.library import instruction_set, set_num_threads
from kernels.linear import linear
from kernels.logprobs import sample, token_logprobs
from kernels.profiles import PROFILES
from kernels.rms_norm import rms_norm
from kernels.truncated import truncated_sample


def _linear():
    for profile, width in itertools.product(PROFILES.values(), (2, 72, 576, 1024)):
        weight = spread(130, width, seed=2).to(profile.weight_dtype)
        yield linear(spread(19, width, seed=1), pack(weight), 130, is_dot=profile.is_dot)


def _subnormals():
    weight = (spread(130, 72, seed=17, low=-70, high=-50)).bfloat16()
    for is_dot in (False, True):
        yield linear(spread(19, 72, seed=16, low=-80, high=-60), pack(weight), 130, is_dot=is_dot)


def _rows():
    yield rms_norm(spread(9, 77, seed=3), spread(77, seed=4), 1e-5)
    yield silu_and_mul(torch.cat([torch.linspace(-120, 120, 4001), spread(4001, seed=5)])[None])
    x = spread(5, 154, seed=6).requires_grad_()
    silu_and_mul(x).backward(spread(5, 77, seed=7))
    yield x.grad


def _attention():
    shapes = ((4, 2, 16, 0), (3, 1, 80, 0), (2, 2, 128, 33))
    for (heads, kv_heads, width, window), kv_dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        shape = (300, heads, width), (300, kv_heads, width), (300, kv_heads, width)
        inputs = [spread(*s, seed=8 + i, low=-3, high=1).requires_grad_() for i, s in enumerate(shape)]
        plan = PackedPlan([(0, 200, -1), (200, 270, 0), (270, 280, 0), (280, 300, -1)], kv_dtype=kv_dtype)
        out = packed_attention(*inputs, plan, width**-0.5, window)
        out.backward(spread(*shape[0], seed=12))
        yield from (out.detach(), *(t.grad for t in inputs))


def _logprobs():
    hidden, weight = spread(20, 72, seed=13, low=-2, high=2), spread(337, 72, seed=14, low=-6, high=-1)
    temperature, number = torch.linspace(0.3, 3.0, 20), torch.arange(2000)
    greedy = (number % 7 == 0).to(torch.uint8)
    for profile in PROFILES.values():
        head = hidden, pack(weight.to(profile.weight_dtype)), 337
        draws = number % 20, number << 30, number, number % 8, greedy
        yield from sample(*head, temperature, *draws, profile.is_dot)
        yield token_logprobs(*head, number[:20], temperature, is_dot=profile.is_dot)


def _truncated():
    for size in (0.0, 3.0, 60.0):
        logits = spread(20, 1500, seed=16, low=-3, high=1) * size
        draws, options = make_draws(300, 20, seed=17), random_options(300, 1500, seed=18)
        result = truncated_sample(logits, draws, options, num_top=5)
        yield from (result.token_ids, result.logprobs, result.raw_logprobs, result.kept_mass, result.num_kept)
        yield from (result.top_ids, result.top_logprobs)


def _digests() -> dict[str, str]:
    set_num_threads(2)
    digests = {"instruction_set": instruction_set(), **{profile: fingerprint(profile) for profile in PROFILES}}
    for make in (_linear, _subnormals, _rows, _attention, _logprobs, _truncated):
        joined = b"".join(t.contiguous().numpy().tobytes() for t in make())
        digests[make.__name__] = hashlib.blake2b(joined, digest_size=16).hexdigest()
    digests["weights"] = tensor_digest(spread(1000, seed=15)).hex()
    return digests


@pytest.mark.parametrize("name", available_instruction_sets())
def test_every_build_gives_the_same_bits(name):
    environment = {**os.environ, "LOCKSTEP_ISA": name, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    digests = json.loads(result.stdout)
    assert digests.pop("instruction_set") == name
    here = _digests()
    here.pop("instruction_set")
    assert digests == here


if __name__ == "__main__":
    print(json.dumps(_digests()))
