"""`python -m engine.dry_run MODEL`: prints what an engine would take and what would fit, without building it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from engine.computation import Device, Numerics
from engine.config import EngineConfig
from engine.memory_plan import MemoryPlan

_SIZES = ("max_model_len", "max_num_seqs", "block_size", "num_blocks", "kv_cache_memory_bytes")
_SHARE = "gpu_memory_utilization"
DEFAULT_LENGTH = 512  # of a prompt and of a completion


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    given = {name: getattr(options, name) for name in (*_SIZES, _SHARE) if getattr(options, name) is not None}
    try:
        config = EngineConfig(options.model, numerics=options.numerics, device=options.device, **given)
        plan = MemoryPlan.from_config(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(plan, options.prompt_length, options.completion_length, options.group_size))
    return 0


def describe(plan: MemoryPlan, prompt_length: int, completion_length: int, group_size: int) -> str:
    """A line for each size, aligned."""
    num_groups = plan.num_groups(prompt_length, completion_length, group_size)
    together = plan.weight_bytes + plan.kv_cache_bytes
    memory = "the GPU has free" if plan.device == "cuda" else "this machine has"
    rows = [
        ("numbers", plan.profile),
        ("weights", _size(plan.weight_bytes)),
        (
            "keys and values",
            f"{plan.block_bytes // plan.block_size:,} bytes a token, {_size(plan.block_bytes)} a block",
        ),
        ("KV pool", f"{plan.num_blocks:,} blocks of {plan.block_size} tokens, {_size(plan.kv_cache_bytes)}"),
        ("together", f"{_size(together)}; {memory} {_size(plan.available_bytes)}"),
        ("tokens that fit", f"{plan.num_tokens:,}"),
        (f"requests of {plan.max_model_len:,}", f"{plan.num_requests(plan.max_model_len):,} at once"),
        (
            f"groups of {group_size}",
            f"{num_groups:,} at once ({num_groups * group_size:,} samples of {prompt_length:,} + {completion_length:,} "
            f"tokens; max_num_seqs={plan.max_num_seqs})",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.dry_run", description=__doc__)
    parser.add_argument("model", help="a directory, a .gguf file, smollm2-135m-instruct or a hub id")
    parser.add_argument("--numerics", choices=get_args(Numerics), default="auto")
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="as EngineConfig has it")
    parser.add_argument(f"--{_SHARE.replace('_', '-')}", type=float, help="as EngineConfig has it")
    parser.add_argument("--prompt-length", type=int, default=DEFAULT_LENGTH, help="tokens of the groups' prompts")
    parser.add_argument("--completion-length", type=int, default=DEFAULT_LENGTH, help="tokens of each sample")
    parser.add_argument("--group-size", type=int, default=8, help="samples of a prompt")
    return parser


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} bytes"


if __name__ == "__main__":
    sys.exit(main())
