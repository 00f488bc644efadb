from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory):
    """Compiles all kernels in a process of its own, since in this one the interpreter may stand in for the compiler."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)

    def run(*options: str) -> list[dict]:
        command = [sys.executable, "-m", "kernels.gpu.ahead_of_time", *options]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert output.returncode == 0, output.stderr
        return [json.loads(line) for line in output.stdout.splitlines()]

    return run


def test_kernels_compile_for_hopper_and_use_its_tensor_cores(compile_for):
    only = ("_linear_kernel", "_rms_norm_kernel", "_whole_kernel", "_chunk_kernel", "_draw_kernel")
    kernels = compile_for("90", "--rows", "32", "--models", "135m", "--only", *only)
    assert {kernel["name"] for kernel in kernels} == set(only)
    check_kernels(kernels, shared_limit=232448)
    check_attention(kernels)
    assert {tuple(one["matrix_instructions"]) for one in named(kernels, "_linear_kernel")} == {wgmma("m64n32k16")}
    assert named(kernels, "_draw_kernel")[0]["matrix_instructions"] == list(wgmma("m64n128k16"))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_limit"), [("80", 166912), ("90", 232448)])
def test_every_kernel_compiles_in_float32(compile_for, capability, shared_limit):
    kernels = compile_for(capability, "--rows", "32", "--models", "135m", "--dtype", "float32")
    for kernel in kernels:
        assert kernel["shared_bytes"] <= shared_limit, kernel
        assert not kernel["matrix_instructions"], kernel


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_limit"), [("80", 166912), ("90", 232448)])
def test_every_kernel_of_every_model_compiles(compile_for, capability, shared_limit):
    kernels = []
    for model in ("135m", "0.5b", "3b", "8b"):
        kernels += compile_for(capability, "--models", model)
        check_attention([kernel for kernel in kernels if kernel["model"] == model])
    assert len({kernel["name"] for kernel in kernels}) == 15
    check_kernels(kernels, shared_limit)
    stats, draw = named(kernels, "_vocab_stats_kernel"), named(kernels, "_draw_kernel")
    assert len({tuple(kernel["matrix_instructions"]) for kernel in stats + draw}) == 1
    assert len({tuple(kernel["reductions"]) for kernel in stats}) == 1
    for kernel in named(kernels, "_linear_kernel"):
        assert all("k16" in instruction for instruction in kernel["matrix_instructions"])
        is_hopper_family = ["wgmma.mma_async.sync.aligned.m64n" in name for name in kernel["matrix_instructions"]]
        assert all(is_hopper_family) if capability == "90" else not any(is_hopper_family)


def check_kernels(kernels, shared_limit):
    for kernel in kernels:
        assert kernel["shared_bytes"] <= shared_limit, kernel
        assert kernel["num_implicit_fusions"] == 0, kernel
    for name in ("_linear_kernel", "_whole_kernel", "_chunk_kernel", "_draw_kernel"):
        assert all(kernel["num_async_copies"] > 0 for kernel in named(kernels, name)), f"{name} is not pipelined"


def check_attention(kernels):
    """The kernel that takes all chunks and the one that takes one of them sum in the same layout."""
    whole, split = named(kernels, "_whole_kernel"), named(kernels, "_chunk_kernel")
    assert len({tuple(kernel["reductions"]) for kernel in whole + split}) == 1
    assert len(whole[0]["reductions"]) == 2
    assert len({tuple(kernel["matrix_instructions"]) for kernel in whole + split}) == 1


def named(kernels, name):
    return [kernel for kernel in kernels if kernel["name"] == name]


def wgmma(shape):
    return (f"wgmma.mma_async.sync.aligned.{shape}.f32.bf16.bf16",)
