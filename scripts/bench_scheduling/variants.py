"""Variants: the loops that are compared - V0's, the engine's, and the engine with one thing changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine import EngineConfig, LLMEngine
from engine.block_pool import BlockPool
from scripts.bench_scheduling.loads import Load
from scripts.bench_scheduling.replay import Figures, Loop, figures_of, replay
from scripts.bench_scheduling.stand_in import StandIn
from scripts.bench_scheduling.v0_loop import V0Loop
from scripts.gpu_check.random_models import random_engine

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}  # fmt: skip
CUT: dict[str, Any] = {**SMOLLM2, "num_hidden_layers": 2}
WIDE: dict[str, Any] = {
    **SMOLLM2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 151936,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SMOLLM2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "num_hidden_layers": 2,
}  # fmt: skip


def shape_of(model: Mapping[str, Any]) -> str:
    """A model in the few words of a table's title."""
    return f"{model['num_hidden_layers']} layers {model['hidden_size']} wide, {model['vocab_size']:,} words"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One loop; its options go over those of the load."""

    name: str
    is_v0: bool = False
    is_whole: bool = False  # prompts are never cut: the step's budget is the longest prompt
    is_sharing: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


V0 = Variant(name="V0-style loop", is_v0=True, is_whole=True, options={"async_scheduling": False})
V1 = Variant(name="Lockstep")
VARIANTS = (
    V0,
    V1,
    Variant(name="  without async", options={"async_scheduling": False}),
    Variant(name="  without chunking", is_whole=True),
    Variant(name="  without sharing", is_sharing=False, options={"enable_prefix_caching": False}),
    Variant(name="  with 8 steps a cycle", options={"num_scheduler_steps": 8}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all variants have in common: the model, the device, and what the load needs."""

    model: Mapping[str, Any]
    max_model_len: int
    options: Mapping[str, Any]  # of EngineConfig
    step_seconds: float | None = None  # of a stand-in for the device; None for the kernels
    token_seconds: float = 0.0  # that the stand-in takes besides for each token of a step

    def config_options(self, variant: Variant) -> dict[str, Any]:
        options = {"max_model_len": self.max_model_len, "async_scheduling": True, **self.options, **variant.options}
        if variant.is_whole:
            most = max(self.max_model_len, options["max_num_batched_tokens"])
            options |= {"max_num_batched_tokens": most, "long_prefill_token_threshold": 0}
        return options


def start(setting: Setting, variant: Variant) -> tuple[Loop, BlockPool]:
    """A fresh loop of the variant, and its blocks."""
    options = setting.config_options(variant)
    runner = None
    if setting.step_seconds is not None:
        runner = StandIn(setting.step_seconds, EngineConfig("stand-in", **options), setting.token_seconds)
    engine = random_engine(setting.model, runner=runner, **options)
    if not variant.is_v0:
        return engine, engine.scheduler.block_pool
    loop = v0_loop(engine, runner)
    return loop, loop.scheduler.block_pool


def v0_loop(engine: LLMEngine, runner: StandIn | None = None) -> V0Loop:
    """The V0-style loop on what an engine has: its runner, its options and its number of blocks."""
    model = engine.model_config
    return V0Loop(
        runner or engine.model_runner,
        engine.config,
        engine.scheduler.block_pool.num_blocks,
        eos_token_ids=model.eos_token_ids,
        vocab_size=model.vocab_size,
    )


def run(setting: Setting, variant: Variant, warm_up: Load, load: Load) -> Figures:
    """The load on a fresh loop; `warm_up` runs before it, so that pages are mapped and steps recorded."""
    loop, block_pool = start(setting, variant)
    if not variant.is_sharing:
        warm_up, load = warm_up.without_groups(), load.without_groups()
    replay(loop, block_pool, warm_up)
    return figures_of(replay(loop, block_pool, load), load)
