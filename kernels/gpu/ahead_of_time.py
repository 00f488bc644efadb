"""Compiles kernels for a GPU that need not be there: `python -m kernels.gpu.ahead_of_time 90` lists what came out.

Ops are called on meta tensors; what they would have launched is compiled instead. Needs triton without its interpreter.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    num_mma: int  # tensor-core instructions in the text, of either family
    num_wgmma: int  # those of Hopper's family
    num_async_copies: int
    ptx: str


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
        num_mma=len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)", ptx)),
        num_wgmma=ptx.count("wgmma.mma_async"),
        num_async_copies=ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
        ptx=ptx,
    )


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
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    shape = {"hidden": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn": 12288, "vocab": 151936}
    for num_rows in (32, 512):
        for one in compile_ops(capability, *ops_of(num_rows=num_rows, **shape)):
            print(
                f"T={num_rows:4} {one.name:32} shared {one.shared_bytes:7} mma {one.num_mma:3} wgmma {one.num_wgmma:3} "
                f"async {one.num_async_copies:3}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
