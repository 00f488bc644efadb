"""ModelConfig: what a model's config.json says about its arithmetic, checked to be something we compute exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.rope_config import num_rope_positions, read_rope_layers, read_rope_scaling, read_rope_theta
from kernels.rope_scaling import RopeScaling

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",  # Llama, SmolLM, SmolLM2
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
# What a config that leaves an entry out means by it, for each of the families above (transformers' defaults).
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_SLIDING_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and constants of a dense decoder (Llama, Mistral, Qwen2, Qwen3 or SmolLM3)."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # with rope scaling, how far it stretches the context
    tie_word_embeddings: bool
    attention_bias: bool = False  # q, k and v projections have a bias
    attention_output_bias: bool = False  # the o projection has one
    has_qk_norm: bool = False  # RMSNorm over each head of q and k, before rotary
    eos_token_ids: tuple[int, ...] = ()
    attention_windows: tuple[int, ...] = ()  # per layer, how many keys a row sees, itself included; 0: all. (): all do
    rope_scaling: RopeScaling | None = None
    rope_layers: tuple[bool, ...] = ()  # per layer, whether it turns queries and keys by their position. (): all do

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        for token_id in self.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"eos_token_id={token_id} is outside the vocabulary of {self.vocab_size} tokens")

    def window_of(self, layer: int) -> int:
        """How many keys a row of this layer sees at most, itself included; 0 where it sees all."""
        return self.attention_windows[layer] if self.attention_windows else 0

    def has_rope(self, layer: int) -> bool:
        """Whether this layer turns queries and keys by their position."""
        return self.rope_layers[layer] if self.rope_layers else True

    @classmethod
    def from_directory(cls, directory: str | Path) -> ModelConfig:
        """Reads config.json (and the end tokens of generation_config.json); ValueError as in `from_dict`."""
        return cls.from_dict(read_config_dict(directory))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads the entries of a Hugging Face config.json, of transformers 4 or 5.

        Raises ValueError for an unsupported architecture or any option that would change the arithmetic.
        """
        architecture = _architecture(config)
        model_type = SUPPORTED_ARCHITECTURES[architecture]
        _check_arithmetic(config)
        num_heads, num_layers = _size(config, "num_attention_heads"), _size(config, "num_hidden_layers")
        rope_scaling = read_rope_scaling(config)
        num_positions = num_rope_positions(_size(config, "max_position_embeddings"), rope_scaling)
        rope_layers = read_rope_layers(config, model_type, num_layers)
        has_bias_option = model_type in ("llama", "qwen3", "smollm3") and bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            model_type=model_type,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=_size(config, "hidden_size"),
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_size(config, "num_key_value_heads", num_heads),
            head_dim=_head_dim(config, model_type, num_heads),
            rms_norm_eps=float(config.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS)),
            rope_theta=read_rope_theta(config, model_type),
            rope_scaling=rope_scaling,
            rope_layers=rope_layers,
            max_position_embeddings=num_positions,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", model_type == "smollm3")),
            attention_bias=has_bias_option or model_type == "qwen2",
            attention_output_bias=has_bias_option,
            has_qk_norm=model_type == "qwen3",
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            attention_windows=_attention_windows(config, model_type, num_layers, num_positions, rope_layers),
        )


def read_config_dict(directory: str | Path) -> dict[str, Any]:
    """The entries of config.json; its `eos_token_id` also has those of generation_config.json, which chat models need.

    Raises ValueError where there is no readable config.json.
    """
    config = _read_json(Path(directory) / "config.json")
    generation_config = Path(directory) / "generation_config.json"
    if generation_config.is_file():
        generation_ids = _token_ids(_read_json(generation_config).get("eos_token_id"))
        token_ids = dict.fromkeys(_token_ids(config.get("eos_token_id")) + generation_ids)
        if len(token_ids) > 1:
            config["eos_token_id"] = list(token_ids)
        elif token_ids:
            config["eos_token_id"] = next(iter(token_ids))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: a model directory in Hugging Face format is needed")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(entries).__name__}")
    return entries


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [
        name for name, model_type in SUPPORTED_ARCHITECTURES.items() if model_type == config.get("model_type")
    ]
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    if not architectures:
        raise ValueError(f"model_type={config.get('model_type')!r} is not supported: use one of {supported}")
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise ValueError(f"architecture {architectures[0]!r} is not supported: use one of {supported}")
    return architectures[0]


def _check_arithmetic(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported: only 'silu' is")
    if config.get("mlp_bias"):
        raise ValueError("mlp_bias=true is not supported: only feed-forward layers without a bias are")
    if config.get("quantization_config"):
        raise ValueError("quantization_config is not supported: use the float32, bfloat16 or float16 checkpoint")
    unknown = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layer_types has {sorted(unknown)}: only full_attention and sliding_attention are supported")


def _head_dim(config: Mapping[str, Any], model_type: str, num_heads: int) -> int:
    if config.get("head_dim") is not None or model_type == "qwen3":
        return _size(config, "head_dim", _QWEN3_HEAD_DIM)
    hidden_size = _size(config, "hidden_size")
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}: give head_dim"
        )
    return hidden_size // num_heads


def _attention_windows(
    config: Mapping[str, Any], model_type: str, num_layers: int, num_positions: int, rope_layers: tuple[bool, ...]
) -> tuple[int, ...]:
    """The window of each layer; () where none is shorter than the context."""
    default = None if model_type == "smollm3" else _DEFAULT_SLIDING_WINDOW
    slides = _sliding_layers(config, model_type, num_layers, rope_layers)
    if not any(slides) or config.get("sliding_window", default) is None:
        return ()
    window = _size(config, "sliding_window", default)
    return tuple(window if slide else 0 for slide in slides) if window < num_positions else ()


def _sliding_layers(
    config: Mapping[str, Any], model_type: str, num_layers: int, rope_layers: tuple[bool, ...]
) -> list[bool]:
    if model_type in ("llama", "mistral"):
        return [model_type == "mistral"] * num_layers
    layer_types = config.get("layer_types")
    if not config.get("use_sliding_window", False):
        if model_type == "smollm3" and "sliding_attention" in (layer_types or ()):
            raise ValueError("layer_types has 'sliding_attention' but use_sliding_window is false: they must agree")
        return [False] * num_layers
    if layer_types is None and model_type == "smollm3":
        return [not has_rope for has_rope in rope_layers or [True] * num_layers]
    if layer_types is None:
        first = config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        return [layer >= first for layer in range(num_layers)]
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries: it needs one for each of {num_layers} layers")
    return [layer_type == "sliding_attention" for layer_type in layer_types]


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise ValueError(f"the model's config has no {name!r}, which is needed")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} in the model's config must be a positive integer")
    return value


def _token_ids(entry: int | list[int] | None) -> tuple[int, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, int) else tuple(entry)
