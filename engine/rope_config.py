"""What a model's config.json says about rotary positions: base, scaling, how far they reach, which layers turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kernels.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, yarn_attention_factor

_DEFAULT_THETA = 10000.0
_SMOLLM3_THETA = 2000000.0
_SMOLLM3_NO_ROPE_INTERVAL = 4
_COMMON_ENTRIES = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ENTRIES_BY_TYPE = {  # what transformers reads for each
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
}


def read_rope_theta(config: Mapping[str, Any], model_type: str) -> float:
    """The base of the rotary frequencies. ValueError unless it is a number above 1."""
    parameters = _entry_with_parameters(config)[1]
    default = _SMOLLM3_THETA if model_type == "smollm3" else _DEFAULT_THETA
    theta = parameters.get("rope_theta") or config.get("rope_theta") or default
    if not _is_number(theta) or theta <= 1:
        raise ValueError(f"rope_theta={theta!r} in the model's config must be a number above 1")
    return float(theta)


def read_rope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling in `rope_parameters` (transformers 5) or `rope_scaling` (4), which wins as it does there; or None.

    Raises ValueError for a kind of scaling, or an entry of it, that we do not compute exactly as transformers does.
    """
    entry, parameters = _entry_with_parameters(config)
    rope_type = _rope_type(entry, parameters)
    _check_whole_heads(config, parameters)
    unknown = sorted(parameters.keys() - _COMMON_ENTRIES - _ENTRIES_BY_TYPE[rope_type])
    if unknown:
        known = ", ".join(sorted(_ENTRIES_BY_TYPE[rope_type])) or "none but rope_theta"
        raise ValueError(f"{entry} has {unknown}, not supported with rope_type={rope_type!r}: entries are {known}")
    if rope_type == "default":
        return None
    factor = _number(entry, parameters, "factor", at_least=1.0)
    if rope_type == "linear":
        return LinearScaling(factor=factor)
    length = _original_length(config, entry, parameters)
    if rope_type == "llama3":
        return _llama3(entry, parameters, factor, length)
    return _yarn(entry, parameters, factor, length)


def num_rope_positions(max_position_embeddings: int, scaling: RopeScaling | None) -> int:
    """The context length: configs with linear or yarn scaling may give the one before it, as Qwen2.5's do."""
    if isinstance(scaling, LinearScaling):
        return int(max_position_embeddings * scaling.factor)
    if isinstance(scaling, YarnScaling):
        return max(max_position_embeddings, int(scaling.original_max_position_embeddings * scaling.factor))
    return max_position_embeddings


def read_rope_layers(config: Mapping[str, Any], model_type: str, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer turns its queries and keys; () where all do. ValueError for a list that is too short."""
    if model_type != "smollm3":
        return ()
    flags = config.get("no_rope_layers")  # in spite of its name 1 stands for a layer with rope
    if flags is None:
        interval = config.get("no_rope_layer_interval", _SMOLLM3_NO_ROPE_INTERVAL)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval!r} in the model's config must be a positive integer")
        flags = [(layer + 1) % interval for layer in range(num_layers)]
    if len(flags) < num_layers:
        raise ValueError(f"no_rope_layers has {len(flags)} entries: it needs one for each of {num_layers} layers")
    layers = tuple(bool(flag) for flag in flags[:num_layers])
    return () if all(layers) else layers


def _entry_with_parameters(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    entry = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    parameters = config.get(entry) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"{entry}={parameters!r} in the model's config must be an object")
    return entry, parameters


def _rope_type(entry: str, parameters: Mapping[str, Any]) -> str:
    nested = [key for key, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(f"{entry} differs by kind of layer ({', '.join(nested)}), which is not supported: give one")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ENTRIES_BY_TYPE:
        raise ValueError(f"{entry}: rope_type={rope_type!r} is not supported: only {', '.join(_ENTRIES_BY_TYPE)} are")
    return rope_type


def _check_whole_heads(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor={partial} is not supported: only whole heads are rotated")


def _llama3(entry: str, parameters: Mapping[str, Any], factor: float, length: int) -> Llama3Scaling:
    low, high = (_number(entry, parameters, name) for name in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ValueError(f"{entry}: low_freq_factor={low} must be less than high_freq_factor={high}")
    return Llama3Scaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length
    )


def _yarn(entry: str, parameters: Mapping[str, Any], factor: float, length: int) -> YarnScaling:
    given = {name: _number(entry, parameters, name) for name in ("beta_fast", "beta_slow") if parameters.get(name)}
    attention_factor = yarn_attention_factor(factor)
    if parameters.get("attention_factor") is not None:
        attention_factor = _number(entry, parameters, "attention_factor")
    return YarnScaling(
        factor=factor, original_max_position_embeddings=length, attention_factor=attention_factor, **given
    )


def _original_length(config: Mapping[str, Any], entry: str, parameters: Mapping[str, Any]) -> int:
    """The context before scaling; transformers looks for it beside the parameters first."""
    name = "original_max_position_embeddings"
    length = config.get(name) or parameters.get(name) or config.get("max_position_embeddings")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{entry}: {name}={length!r} must be a positive integer")
    return length


def _number(entry: str, parameters: Mapping[str, Any], name: str, at_least: float = 0.0) -> float:
    value = parameters.get(name)
    if not _is_number(value) or value <= 0 or value < at_least:
        limit = f"of at least {at_least}" if at_least else "above 0"
        raise ValueError(f"{entry}: {name}={value!r} must be a number {limit}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
