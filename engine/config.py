"""EngineConfig: every option of an inference engine, checked once when it is made."""

from __future__ import annotations

import difflib
import os
from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal

from engine.computation import Computation, Device, DeviceName, Numerics, check_computation, require_choice
from engine.model_config import ModelConfig

__all__ = ["EngineConfig", "ModelConfig", "reject_unknown_options"]

KVCacheDtype = Literal["auto", "float32", "bfloat16"]

BLOCK_SIZE_MULTIPLE = 16  # the attention kernels' lanes run over this many slots


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine. `model` may be given by position, the others by name.

    Raises ValueError for a value out of range and TypeError, with the list of options, for an unknown name.
    """

    model: str  # a Hugging Face directory, a .gguf file, "smollm2-135m-instruct" (packaged), or a hub id
    _: KW_ONLY
    # the numerics profile (docs/numerics.md): "auto" is float32 on a CPU and bfloat16 on CUDA, whose two profiles are
    # called gpu-bfloat16 and gpu-float32 elsewhere; bfloat16-dot is a CPU's
    numerics: Numerics = "auto"
    kv_cache_dtype: KVCacheDtype = "auto"  # follows numerics: float32, or bfloat16 with the bfloat16 profiles
    # "auto" is cuda where torch finds one, unless numerics is bfloat16-dot; "interpreter" runs the kernels of cuda by
    # Triton's interpreter on the CPU, for tests
    device: Device = "auto"
    enforce_eager: bool = False  # decode steps are not recorded (CPU) or captured as CUDA graphs
    num_threads: int | None = None  # kernel threads; None becomes the number of cores this process may use
    block_size: int = 16  # tokens in one KV block, a multiple of 16
    num_blocks: int | None = None  # size of the KV pool in blocks; None derives it from kv_cache_memory_bytes
    kv_cache_memory_bytes: int | None = None  # size of the KV pool in bytes; None lets the engine choose
    # of a GPU's memory, what the engine takes at most for weights, activations and a KV pool whose size it chooses
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None  # longest prompt + completion; None is the model's context length
    max_num_seqs: int = 256  # samples that run at once
    max_num_batched_tokens: int = 2048  # token budget of one step
    long_prefill_token_threshold: int = 0  # most tokens one request may take of a step; 0 is no limit
    enable_prefix_caching: bool = True
    # plan a step while the one before runs; "auto" where the device is not the host, or num_threads leaves a core free
    async_scheduling: bool | Literal["auto"] = "auto"
    num_scheduler_steps: int = 1  # decode steps in one scheduling cycle
    seed: int = 0  # requests without a seed derive theirs from it
    # a file for a Chrome trace of the steps, written by write_trace() and at the engine's end; {pid} in it stands for
    # the process, so that engines of a pool have one each
    trace_path: str | None = None

    def __new__(cls, *args: object, **options: object) -> EngineConfig:
        reject_unknown_options(cls, options)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _model_name(self.model))
        if self.num_threads is None:
            object.__setattr__(self, "num_threads", available_cores())
        if self.trace_path is not None:
            object.__setattr__(self, "trace_path", os.fspath(self.trace_path))
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        check_computation(self.numerics, self.device)
        if self.kv_cache_dtype != "auto":
            of_profile = self.profile_name.removeprefix("gpu-").removesuffix("-dot")
            require_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", of_profile))
        require_choice("enforce_eager", self.enforce_eager, (True, False))
        require_choice("async_scheduling", self.async_scheduling, ("auto", True, False))
        require_choice("enable_prefix_caching", self.enable_prefix_caching, (True, False))

    def _check_ranges(self) -> None:
        for name in ("num_threads", "block_size", "max_num_seqs", "max_num_batched_tokens", "num_scheduler_steps"):
            _require_int(name, getattr(self, name), minimum=1)
        for name, minimum in (("num_blocks", 1), ("kv_cache_memory_bytes", 1), ("max_model_len", 2)):
            if getattr(self, name) is not None:
                _require_int(name, getattr(self, name), minimum=minimum)
        _require_int("long_prefill_token_threshold", self.long_prefill_token_threshold, minimum=0)
        _require_int("seed", self.seed, minimum=0, maximum=2**64 - 1)
        if self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(f"block_size={self.block_size} must be a multiple of {BLOCK_SIZE_MULTIPLE}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most 1")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError(
                f"num_blocks={self.num_blocks} and kv_cache_memory_bytes={self.kv_cache_memory_bytes} both size the "
                "KV pool: give one of them"
            )

    @property
    def device_name(self) -> DeviceName:
        """The device in force, as this process sees the machine."""
        return Computation.resolve(self.numerics, self.device).device_name

    @property
    def is_async(self) -> bool:
        """Whether a step is planned while the one before runs."""
        if self.async_scheduling != "auto":
            return self.async_scheduling
        return self.device_name == "cuda" or self.num_threads < available_cores()

    @property
    def profile_name(self) -> str:
        """The numerics profile in force, on the device in force."""
        return Computation.resolve(self.numerics, self.device).profile_name

    def resolve_max_model_len(self, model_config: ModelConfig) -> int:
        """The longest prompt + completion, in tokens: as asked for, or all that the model can do.

        Raises ValueError where more is asked for than the model can do.
        """
        limit = model_config.max_position_embeddings
        if self.max_model_len is None:
            return limit
        if self.max_model_len > limit:
            raise ValueError(
                f"max_model_len={self.max_model_len} exceeds the model's context length (max_position_embeddings) of "
                f"{limit}: lower it"
            )
        return self.max_model_len


def available_cores() -> int:
    """Cores that this process may run on, which in a container or under taskset are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def reject_unknown_options(options_class: type, options: dict[str, object]) -> None:
    """Raises TypeError, naming the nearest option and all that exist, if `options` has a name that the class lacks."""
    known = [field.name for field in fields(options_class) if field.init]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{options_class.__name__} has no option {name!r}{hint} Options: {', '.join(known)}")


def _model_name(model: object) -> str:
    if not isinstance(model, (str, os.PathLike)) or not str(model).strip():
        raise ValueError(f"model={model!r} must be a directory, a .gguf file, 'smollm2-135m-instruct' or a hub id")
    return os.fspath(model)


def _require_int(name: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be an integer")
    if value < minimum:
        raise ValueError(f"{name}={value} must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}={value} must be at most {maximum}")
