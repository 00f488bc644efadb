"""Compiles kernels for a GPU that need not be there: `python -m kernels.gpu.ahead_of_time 90` lists what came out.

Ops are called on meta tensors; what they would have launched is compiled instead. Needs triton without its interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
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


def compile_ops(capability: int, *ops: Callable[[], object]) -> Iterator[Compiled]:
    """Compiles every kernel that the ops launch on their meta tensors, for compute capability 80, 90, ..."""
    if is_interpreted():
        raise ValueError("TRITON_INTERPRET=1 replaces the compiler: unset it before kernels.gpu is imported")
    for op in ops:
        with recorded_launches() as launches:
            op()
        for launch in launches:
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


def ops_of(
    *, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, ffn: int, vocab: int, num_rows: int
) -> list[Callable[[], object]]:
    """Every op of a bfloat16 model of this shape on `num_rows` meta rows; those of a trainer with their gradients."""
    num_vectors = num_heads + 2 * num_kv_heads
    x, residual = _meta(num_rows, hidden), _meta(num_rows, hidden, dtype=torch.float32)
    norm, head_norm = _meta(hidden, dtype=torch.float32), _meta(head_dim, dtype=torch.float32)
    qkv = _meta(num_rows, num_vectors, head_dim)
    positions, table = _meta(num_rows, dtype=torch.int64), _meta(4096, head_dim, dtype=torch.float32)
    head, heat, greedy = _meta(vocab, hidden), _meta(num_rows, dtype=torch.float32), _meta(num_rows, dtype=torch.uint8)
    qk, v = qkv.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    q, k = qk.split([num_heads, num_kv_heads], dim=1)
    qkv_bias = _meta(num_vectors * head_dim, dtype=torch.float32)
    return [
        lambda: linear(x, _meta(num_vectors * head_dim, hidden), qkv_bias),
        lambda: linear(_meta(num_rows, ffn), _meta(hidden, ffn), out_dtype=torch.float32),
        lambda: rms_norm(residual, norm, 1e-5),
        lambda: add_rms_norm(residual, residual, norm, 1e-5),
        lambda: rotary(qk, positions, table),
        lambda: norm_and_rotary(qk, positions, table, head_norm, head_norm, num_heads, 1e-6),
        lambda: silu_and_mul(_meta(num_rows, 2 * ffn).requires_grad_()).sum().backward(),
        *_attention_ops(q, k, v),
        lambda: token_logprobs(x, head, positions, heat),
        lambda: sample(x, head, heat, positions, positions, positions, positions, greedy),
    ]


def _attention_ops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Callable[[], object]]:
    num_rows, num_kv_heads, head_dim = k.shape
    blocks, tables = _meta(64, num_kv_heads, 16, head_dim), _meta(num_rows, 256, dtype=torch.int32)
    starts, slots = _meta(num_rows + 1, dtype=torch.int32), _meta(num_rows, dtype=torch.int64)
    plan = PackedPlan([(0, num_rows, -1)], "meta")
    return [
        lambda: attention.kv_store(k, v, blocks, blocks, slots),
        lambda: attention.copy_blocks(_meta(2, 64, 16, 32), _meta(3, 2, dtype=torch.int64)),
        lambda: attention.whole_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125),
        lambda: attention.whole_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125, window=100),
        lambda: attention.split_attention(q, blocks, blocks, tables, starts, starts[1:], 0.125),
        lambda: packed_attention(q.detach().requires_grad_(), k, v, plan, 0.125).sum().backward(),
    ]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def main() -> int:
    """Prints a JSON object for each kernel of an 8B model. Arguments: compute capability, numbers of rows."""
    capability, *row_counts = [int(argument) for argument in sys.argv[1:]] or [90]
    shape = {"hidden": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn": 12288, "vocab": 151936}
    for num_rows in row_counts or [32, 512]:
        for compiled in compile_ops(capability, *ops_of(num_rows=num_rows, **shape)):
            print(json.dumps({"num_rows": num_rows, **asdict(compiled)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
