"""The dry run says what the engine then does, and loads nothing to know it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.dry_run import main
from engine.memory_plan import MemoryPlan


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_the_plan_is_what_an_engine_has(tiny_model_dir: Callable[..., Path], numerics: str) -> None:
    config = EngineConfig(str(tiny_model_dir()), numerics=numerics, kv_cache_memory_bytes=2**20, max_num_seqs=8)
    plan, engine = MemoryPlan.from_config(config), LLMEngine(config)
    runner = engine.model_runner
    assert plan.num_blocks == engine.stats().num_blocks
    assert plan.kv_cache_bytes == runner.kv_storage.numel() * runner.kv_storage.element_size()
    packed = {id(m): m for m in runner.model.modules() if hasattr(m, "packed")}.values()
    assert plan.weight_bytes == sum(m.num_outputs * m.num_inputs * m.packed.element_size() for m in packed)
    assert plan.max_model_len == engine.max_model_len


def test_as_many_groups_fit_as_it_says(tiny_model_dir: Callable[..., Path]) -> None:
    config = EngineConfig(str(tiny_model_dir()), num_blocks=37, max_num_seqs=64, num_threads=2)
    plan = MemoryPlan.from_config(config)
    params = SamplingParams(n=4, max_tokens=40, ignore_eos=True)
    num_groups = plan.num_groups(prompt_length=40, completion_length=40, group_size=4)
    assert num_groups == 2
    for count, is_preempted in ((num_groups, False), (num_groups + 1, True)):
        engine = LLMEngine(config)
        engine.generate([[5 + i] * 40 for i in range(count)], params)
        assert (engine.stats().num_preemptions > 0 or engine.stats().num_steps > 40) == is_preempted


def test_it_prints_a_table_and_loads_no_weight(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_model_dir() / "config.json", tmp_path)
    assert main([str(tmp_path), "--num-blocks", "100", "--max-num-seqs", "16", "--group-size", "4"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.strip().splitlines())
    assert lines["tokens that fit"].strip() == "1,600"
    assert "100 blocks of 16 tokens" in lines["KV pool"]
    assert "samples of 512 + 512" in lines["groups of 4"]


def test_a_mistake_is_an_error_and_an_exit_code(
    tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model_dir()), "--block-size", "5"]) == 2
    assert "block_size=5 must be a multiple of 16" in capsys.readouterr().err
    assert main([str(tiny_model_dir()), "--gpu-memory-utilization", "2"]) == 2
    assert "gpu_memory_utilization=2.0 must be above 0 and at most 1" in capsys.readouterr().err
    assert main(["/nowhere/at/all"]) == 2
    assert "error:" in capsys.readouterr().err
