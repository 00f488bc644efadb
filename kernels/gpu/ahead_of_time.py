"""Compiles kernels for a GPU that need not be there: `python -m kernels.gpu.ahead_of_time 90` says what came out.

Ops are called on meta tensors; what they would have launched is compiled instead. Needs triton without its interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu import attention
from kernels.gpu.activation import silu_and_mul
from kernels.gpu.launch import Launch, is_interpreted, recorded_launches
from kernels.gpu.linear import linear
from kernels.gpu.logprobs import sample, token_logprobs
from kernels.gpu.packed_attention import packed_attention
from kernels.gpu.packed_plan import PackedPlan
from kernels.gpu.rms_norm import add_rms_norm, rms_norm
from kernels.gpu.rotary import norm_and_rotary, rotary

WARP = 32
_POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of one launch."""

    name: str
    shared_bytes: int  # shared memory of a program
    matrix_instructions: list[str]  # the kinds of tensor-core instructions in it
    num_async_copies: int
    reductions: list[str]  # the layouts over which it sums or takes maxima; equal layouts, equal order
    num_implicit_fusions: int  # operations that may be fused though the source does not say so: must be 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The widths of a model."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


SHAPES = {
    "135m": Shape(hidden=576, num_heads=9, num_kv_heads=3, head_dim=64, ffn=1536, vocab=49152),  # SmolLM2
    "0.5b": Shape(hidden=896, num_heads=14, num_kv_heads=2, head_dim=64, ffn=4864, vocab=151936),  # Qwen2.5
    "0.6b": Shape(hidden=1024, num_heads=16, num_kv_heads=8, head_dim=128, ffn=3072, vocab=151936),  # Qwen3
    "3b": Shape(hidden=2560, num_heads=32, num_kv_heads=32, head_dim=80, ffn=10240, vocab=50304),  # heads of 80
    "8b": Shape(hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=12288, vocab=151936),  # Qwen3
}


def compile_ops(capability: int, *ops: Callable[[], object], only: Collection[str] | None = None) -> Iterator[Compiled]:
    """Compiles the kernels that the ops launch on their meta tensors, for compute capability 80, 90, ...

    only: names of kernels; the others are left out.
    """
    if is_interpreted():
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler: unset it before kernels.gpu is imported")
    for op in ops:
        with recorded_launches() as launches:
            op()
        for launch in launches:
            if only is None or launch.kernel.__name__ in only:
                yield _compile(launch, capability)


def _compile(launch: Launch, capability: int) -> Compiled:
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments)) | launch.constants
    assert list(values) == names, f"{launch.kernel.__name__}: arguments {list(values)} are not {names}"
    signature = {name: _type_of(values[name], name in launch.constants) for name in names}
    constants = {(at,): values[name] for at, name in enumerate(names) if signature[name] == "constexpr"}
    pointers = [at for at, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants,
        attrs={(at,): [["tt.divisibility", 16]] for at in pointers},
    )  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    ptx = compiled.asm["ptx"]
    return Compiled(
        name=launch.kernel.__name__,
        shared_bytes=compiled.metadata.shared,
        matrix_instructions=sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*", ptx))),
        num_async_copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        reductions=_reduction_layouts(compiled.asm["ttgir"]),
        num_implicit_fusions=len(re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)", ptx)),  # without .rn: free to fuse
    )


def _reduction_layouts(ttgir: str) -> list[str]:
    """How the operands of each reduction lie in registers, threads and warps, as Triton's own text has it."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, flags=re.MULTILINE))
    operands = re.findall(r'"tt\.reduce".*?\}\) : \((tensor<[^)]*?>)(?:, [^)]*)?\) ->', ttgir, flags=re.DOTALL)
    return [re.sub(r"#\w+", lambda name: aliases.get(name[0], name[0]), operand) for operand in operands]


def _type_of(value: object, is_constant: bool) -> str:
    if is_constant or value is None:
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def ops_of(config: Shape, num_rows: int, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Every op of a model of this shape on `num_rows` meta rows; those of a trainer with their gradients."""
    D, N, K, H, F = config.hidden, config.num_heads, config.num_kv_heads, config.head_dim, config.ffn
    float32, int64 = torch.float32, torch.int64
    x_TD, residual_TD, norm_D = _meta(dtype, num_rows, D), _meta(float32, num_rows, D), _meta(float32, D)
    qkv_TXH, head_norm_H = _meta(dtype, num_rows, N + 2 * K, H), _meta(float32, H)
    positions, table = _meta(int64, num_rows), _meta(float32, 4096, H)
    head_VD, heat, greedy = _meta(dtype, config.vocab, D), _meta(float32, num_rows), _meta(torch.uint8, num_rows)
    qk_TXH, v_TKH = qkv_TXH.split([N + K, K], dim=1)
    q_TNH, k_TKH = qk_TXH.split([N, K], dim=1)
    return [
        lambda: linear(x_TD, _meta(dtype, (N + 2 * K) * H, D), _meta(float32, (N + 2 * K) * H)),
        lambda: linear(_meta(dtype, num_rows, F), _meta(dtype, D, F), out_dtype=float32),
        lambda: rms_norm(residual_TD, norm_D, 1e-5, dtype),
        lambda: add_rms_norm(residual_TD, residual_TD, norm_D, 1e-5, dtype),
        lambda: rotary(qk_TXH, positions, table),
        lambda: norm_and_rotary(qk_TXH, positions, table, head_norm_H, head_norm_H, N, 1e-6),
        lambda: silu_and_mul(_meta(dtype, num_rows, 2 * F).requires_grad_()).sum().backward(),
        *_attention_ops(q_TNH, k_TKH, v_TKH),
        lambda: token_logprobs(x_TD, head_VD, positions, heat),
        lambda: sample(x_TD, head_VD, heat, positions, positions, positions, positions, greedy),
    ]


def _attention_ops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Callable[[], object]]:
    num_rows, num_kv_heads, head_dim = k.shape
    blocks, tables = _meta(q.dtype, 64, num_kv_heads, 16, head_dim), _meta(torch.int32, num_rows, 256)
    starts, slots = _meta(torch.int32, num_rows + 1), _meta(torch.int64, num_rows)
    plan = PackedPlan([(0, num_rows, -1)], "meta")
    return [
        lambda: attention.kv_store(k, v, blocks, blocks, slots),
        lambda: attention.copy_blocks(blocks[None], _meta(torch.int64, 3, 2)),
        lambda: attention.whole_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125),
        lambda: attention.whole_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125, window=100),
        lambda: attention.split_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125),
        lambda: packed_attention(q.detach().requires_grad_(), k, v, plan, 0.125).sum().backward(),
    ]


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def main() -> int:
    """Prints a JSON object for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, help="80 for A100, 90 for H100")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 512], help="rows of a batch")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["8b"], help="shapes of known models")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="names of kernels; the others are left out")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    for model in options.models:
        for num_rows in options.rows:
            ops = ops_of(SHAPES[model], num_rows, getattr(torch, options.dtype))
            for compiled in compile_ops(options.capability, *ops, only=options.only):
                print(json.dumps({"model": model, "num_rows": num_rows, **asdict(compiled)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
