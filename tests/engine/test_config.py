"""EngineConfig and ModelConfig: what they read, and what they refuse with words that help."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import pytest

from engine.config import BLOCK_SIZE_MULTIPLE, EngineConfig
from engine.model_config import ModelConfig
from kernels.attention import SLOTS_MULTIPLE
from kernels.rope_scaling import LinearScaling, Llama3Scaling, YarnScaling, yarn_attention_factor

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}

SMOLLM3 = {"architectures": ["SmolLM3ForCausalLM"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def model_config(**entries: object) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **entries})


def test_engine_config_takes_the_model_by_position_and_survives_pickle_and_replace():
    config = EngineConfig("some-model", block_size=32)
    assert config.model == "some-model"
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, seed=7) == EngineConfig(model="some-model", block_size=32, seed=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_num_threads_is_recorded_as_the_cores_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert EngineConfig("m").num_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert EngineConfig("m").num_threads == len(allowed)
    assert EngineConfig("m", num_threads=5).num_threads == 5


def test_unknown_option_names_the_nearest_and_all_others():
    with pytest.raises(TypeError, match="no option 'max_num_seq', did you mean 'max_num_seqs'") as error:
        EngineConfig("m", max_num_seq=3)
    for field in dataclasses.fields(EngineConfig):
        assert field.name in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("num_threads", 0),
        ("block_size", 0),
        ("block_size", 16.0),
        ("block_size", 24),
        ("block_size", True),
        ("num_blocks", 0),
        ("kv_cache_memory_bytes", -1),
        ("max_model_len", 1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("long_prefill_token_threshold", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("numerics", "float16"),
        ("kv_cache_dtype", "bfloat16"),  # with numerics float32
        ("kv_cache_dtype", "fp8"),
        ("device", "cuda"),
        ("async_scheduling", "on"),
        ("async_scheduling", 1),
        ("enable_prefix_caching", "yes"),
        ("enable_prefix_caching", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option}={value!r}"):
        EngineConfig(**{"model": "m", option: value})


def test_block_sizes_are_those_the_kernels_take():
    assert BLOCK_SIZE_MULTIPLE == SLOTS_MULTIPLE


def test_pool_size_is_given_once():
    with pytest.raises(ValueError, match="give one of them"):
        EngineConfig("m", num_blocks=4, kv_cache_memory_bytes=1 << 20)


def test_max_model_len_is_the_context_length_unless_asked_for_less():
    model = model_config()
    assert EngineConfig("m").resolve_max_model_len(model) == 512
    assert EngineConfig("m", max_model_len=100).resolve_max_model_len(model) == 100
    with pytest.raises(ValueError, match=r"max_model_len=513 exceeds the model's context length .* of 512"):
        EngineConfig("m", max_model_len=513).resolve_max_model_len(model)


def test_a_sliding_window_does_not_limit_max_model_len():
    model = model_config(architectures=["MistralForCausalLM"], sliding_window=128)
    assert model.attention_windows == (128, 128)
    assert EngineConfig("m").resolve_max_model_len(model) == 512
    assert model_config(architectures=["MistralForCausalLM"], sliding_window=None).attention_windows == ()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"tie_word_embeddings": False, "head_dim": 32}, {"num_attention_heads": 9, "num_key_value_heads": 3}],
    ids=["plain", "untied-wide-heads", "nine-heads"],
)
def test_model_config_agrees_with_transformers(tiny_model_dir, family, overrides):
    from transformers import AutoModelForCausalLM

    directory = tiny_model_dir(family, **overrides)
    config = ModelConfig.from_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    attention, theirs = model.model.layers[0].self_attn, model.config
    assert config.architecture == type(model).__name__
    assert (config.model_type, config.vocab_size) == (theirs.model_type, model.lm_head.weight.shape[0])
    assert (config.hidden_size, config.intermediate_size) == tuple(
        reversed(model.model.layers[0].mlp.up_proj.weight.shape)
    )
    assert config.num_layers == len(model.model.layers)
    assert config.num_heads * config.head_dim == attention.q_proj.weight.shape[0]
    assert config.num_kv_heads * config.head_dim == attention.v_proj.weight.shape[0]
    assert config.num_heads == theirs.num_attention_heads
    assert config.attention_bias == (attention.k_proj.bias is not None)
    assert config.attention_output_bias == (attention.o_proj.bias is not None)
    assert config.has_qk_norm == hasattr(attention, "q_norm")
    assert config.tie_word_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert config.rms_norm_eps == model.model.norm.variance_epsilon
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.eos_token_ids == (2,)
    assert config.attention_windows == ()
    has_rope = [bool(getattr(layer.self_attn, "use_rope", True)) for layer in model.model.layers]
    assert [config.has_rope(layer) for layer in range(config.num_layers)] == has_rope


@pytest.mark.parametrize(
    ("family", "has_output_bias"), [("llama", True), ("qwen3", True), ("qwen2", False), ("smollm3", True)]
)
def test_attention_bias_covers_the_output_projection_where_transformers_does(tiny_model_dir, family, has_output_bias):
    from safetensors import safe_open

    directory = tiny_model_dir(family, attention_bias=True)
    config = ModelConfig.from_directory(directory)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert ("model.layers.0.self_attn.o_proj.bias" in file.keys()) == has_output_bias  # noqa: SIM118
    assert (config.attention_bias, config.attention_output_bias) == (True, has_output_bias)


def test_rope_theta_is_read_from_old_and_new_configs():
    assert model_config().rope_theta == 10000.0
    assert model_config(rope_theta=5e5).rope_theta == 5e5
    assert model_config(rope_theta=5e5, rope_scaling=None).rope_theta == 5e5
    assert model_config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}).rope_theta == 1e6
    assert model_config(**SMOLLM3).rope_theta == 2e6


@pytest.mark.parametrize(
    ("rope", "expected", "num_positions"),
    [
        ({"rope_type": "default"}, None, 512),
        ({"rope_type": "linear", "factor": 2}, LinearScaling(factor=2.0), 1024),
        (
            {**LLAMA3, "original_max_position_embeddings": 128},
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
            512,
        ),
        (
            {**YARN, "original_max_position_embeddings": 256},
            YarnScaling(factor=4.0, original_max_position_embeddings=256, attention_factor=yarn_attention_factor(4.0)),
            1024,
        ),
        (
            {"rope_type": "yarn", "factor": 1.5, "attention_factor": 0.8, "beta_fast": 16, "beta_slow": 2},
            YarnScaling(
                factor=1.5, original_max_position_embeddings=512, attention_factor=0.8, beta_fast=16.0, beta_slow=2.0
            ),
            768,
        ),
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-all"],
)
def test_rope_scaling_is_read_from_old_and_new_configs(rope, expected, num_positions):
    new = model_config(rope_parameters={**rope, "rope_theta": 5e5})
    assert (new.rope_scaling, new.max_position_embeddings) == (expected, num_positions)
    assert model_config(rope_scaling=rope, rope_theta=5e5) == new
    oldest = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    assert model_config(rope_scaling=oldest, rope_theta=5e5) == new


@pytest.mark.parametrize(
    "overrides",
    [{}, {"no_rope_layer_interval": 2}, {"no_rope_layers": [0, 1, 1, 0, 0]}, {"no_rope_layers": [1] * 5}],
    ids=["every-fourth", "every-second", "listed", "none"],
)
def test_layers_without_rope_and_their_windows_are_those_of_transformers(overrides):
    from transformers import SmolLM3Config

    options = {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 8, **overrides}
    theirs = SmolLM3Config(**options)
    smollm3 = {**SMOLLM3, **options}
    for ours in (model_config(**smollm3), model_config(**{**smollm3, "layer_types": theirs.layer_types})):
        assert [ours.has_rope(layer) for layer in range(5)] == [bool(flag) for flag in theirs.no_rope_layers]
        windows = [8 if layer_type == "sliding_attention" else 0 for layer_type in theirs.layer_types]
        assert [ours.window_of(layer) for layer in range(5)] == windows


def test_smollm3_ties_its_embedding_unless_it_says_otherwise():
    assert model_config(**SMOLLM3).tie_word_embeddings
    assert not model_config(**SMOLLM3, tie_word_embeddings=False).tie_word_embeddings
    assert not model_config().tie_word_embeddings


def test_missing_architectures_follow_from_the_model_type():
    assert model_config(architectures=None, model_type="qwen2").architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported: use one of LlamaForCausalLM"),
        ({"architectures": None, "model_type": "bert"}, "'bert' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic' is not"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling: rope_type='mrope' is not"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type='longrope' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"by kind of layer \(full_attention\)"),
        ({"rope_scaling": {**YARN, "mscale": 1.0}}, r"rope_scaling has \['mscale'\], not supported with .*'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"has \['factor'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None must be a number above 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4}}, "low_freq_factor=4.0 must be less than high_freq_factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None must be a number of at least 1.0"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor=0.5 must be"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 1.5}}, "original_max_position_embeddings=1.5"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' in the model's config must be an object"),
        ({"rope_theta": 1.0}, "rope_theta=1.0"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({**SMOLLM3, "no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
        ({**SMOLLM3, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ({**SMOLLM3, "layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "use_sliding_window is false"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "multiple of num_kv_heads=3"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"vocab_size": "320"}, "vocab_size='320'"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": 6}, "hidden_size=64 is not a multiple"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"eos_token_id": 320}, "eos_token_id=320 is outside"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(entries, words):
    with pytest.raises(ValueError, match=words):
        model_config(**entries)


@pytest.mark.parametrize(
    ("entries", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 128}, ()),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}, ()),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}, (0, 128)),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, (128, 128)),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, ()),
        ({"use_sliding_window": True, "sliding_window": 128, "layer_types": ["full_attention"] * 2}, ()),
        (
            {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            (7, 0),
        ),
    ],
)
def test_qwen_window_counts_only_where_a_layer_slides_and_it_is_shorter_than_the_context(entries, windows):
    assert model_config(architectures=["Qwen2ForCausalLM"], **entries).attention_windows == windows


def test_windows_that_make_no_sense_are_refused():
    qwen = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(ValueError, match="layer_types has 3 entries: it needs one for each of 2 layers"):
        model_config(**qwen, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ValueError, match="sliding_window=0"):
        model_config(architectures=["MistralForCausalLM"], sliding_window=0)


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (2, 5)


def test_a_directory_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        ModelConfig.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_directory(tmp_path)
