"""Reads a GGUF file as what a Hugging Face directory would hold: config entries, float32 weights, tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.tokenizer import check_foreign_kernels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Vocabularies learned with every digit apart, as llama.cpp splits them (llama-vocab.cpp).
_SINGLE_DIGIT_VOCABULARIES = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


class GGUFModel:
    """One open GGUF file of the Llama, Qwen2 or Qwen3 family. Raises ValueError for anything else."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.reader = _open(self.path)
        self.tensor_names = [tensor.name for tensor in self.reader.tensors]
        self.family = self._metadata("general.architecture", "")
        if self.family not in _ARCHITECTURES:
            raise ValueError(
                f"{path}: GGUF architecture {self.family!r} is not supported: use one of {', '.join(_ARCHITECTURES)}"
            )
        self._check_arithmetic()

    def config_dict(self) -> dict[str, Any]:
        """The entries of the config.json that this file's metadata stands for."""
        num_heads = self._size("attention.head_count")
        config = {
            "architectures": [_ARCHITECTURES[self.family]],
            "model_type": self.family,
            "vocab_size": self._vocab_size(),
            "hidden_size": self._size("embedding_length"),
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._size("attention.head_count_kv", num_heads),
            "head_dim": self._head_dim(),
            "hidden_act": "silu",
            "rms_norm_eps": self._size("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_type": "default", "rope_theta": self._size("rope.freq_base", 10000.0)},
            "max_position_embeddings": self._size("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensor_names,
            "bos_token_id": self._metadata("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_token_ids(),
            "pad_token_id": self._metadata("tokenizer.ggml.padding_token_id"),
        }
        if self.family != "qwen2":  # where the bias is part of the architecture, not an option
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensor_names
        return config

    def iter_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Hugging Face names and float32 tensors, dequantised one at a time, in the order of the file."""
        import gguf
        import numpy as np
        import torch

        for tensor in self.reader.tensors:
            name = self._weight_name(tensor.name)
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            # a copy, because unquantised values are a read-only view of the file
            yield name, torch.from_numpy(np.array(self._unpermute(name, values), dtype=np.float32))

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with its chat template, as transformers builds it from the metadata; None where it has none."""
        if self._metadata("tokenizer.ggml.model") is None:
            return None
        check_foreign_kernels()
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        if self._metadata("tokenizer.ggml.pre") in _SINGLE_DIGIT_VOCABULARIES:
            # transformers leaves the digits together, which cuts the white space before them differently
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        return tokenizer

    def _check_arithmetic(self) -> None:
        if self._size("expert_count", 0):
            raise ValueError(f"{self.path}: mixture-of-experts models are not supported")
        scaling = self._size("rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.tensor_names:
            raise ValueError(f"{self.path}: rope scaling from GGUF is not supported: use safetensors")
        head_dim = self._head_dim()
        if self._size("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.path}: rotary embedding of a part of each head is not supported")
        if self._size("attention.sliding_window", 0):
            raise ValueError(f"{self.path}: sliding-window attention from GGUF is not supported: use safetensors")

    def _head_dim(self) -> int:
        default = self._size("embedding_length") // self._size("attention.head_count")
        return self._size("attention.key_length", default)

    def _vocab_size(self) -> int:
        rows = next((t.shape[-1] for t in self.reader.tensors if t.name == "token_embd.weight"), None)
        if rows is None:
            raise ValueError(f"{self.path} has no token_embd.weight: it holds no whole model")
        return int(rows)

    def _eos_token_ids(self) -> int | list[int] | None:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        token_ids = list(dict.fromkeys(self._metadata(key) for key in keys if self._metadata(key) is not None))
        return token_ids if len(token_ids) > 1 else next(iter(token_ids), None)

    def _weight_name(self, name: str) -> str:
        if name in _TOP_NAMES:
            return _TOP_NAMES[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _LAYER_NAMES:
            raise ValueError(f"{self.path}: tensor {name!r} has no place in {_ARCHITECTURES[self.family]}")
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"

    def _unpermute(self, name: str, values: np.ndarray) -> np.ndarray:
        """Undoes llama.cpp's order of q and k rows in the llama family, where rotary pairs lie side by side."""
        if self.family != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return values
        pairs = values.reshape(-1, self._head_dim() // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _size(self, key: str, default: Any = None) -> Any:
        value = self._metadata(f"{self.family}.{key}", default)
        if value is None:
            raise ValueError(f"{self.path}: metadata has no {self.family}.{key}")
        return value

    def _metadata(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error
