"""Checkpoint: models are found, converted, read and written without losing a bit, or refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import iter_weights, model_path_of_package, read_model_config, resolve_model, save_pretrained
from engine.model_config import ModelConfig, read_config_dict
from engine.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCKSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert sorted(weights) == sorted(others)
    for name, tensor in weights.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def transformers_weights(directory: Path, **options: object) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


# Reading


def test_weights_are_read_as_stored(tiny_model_dir):
    directory = tiny_model_dir("qwen3", tie_word_embeddings=False)
    weights = dict(iter_weights(directory))
    assert "lm_head.weight" in weights
    assert_same_weights(weights, transformers_weights(directory))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_type(tmp_path, dtype):
    save_file({"a": torch.tensor([1.5, -2.0], dtype=dtype)}, tmp_path / "model.safetensors")
    assert_same_weights(dict(iter_weights(tmp_path)), {"a": torch.tensor([1.5, -2.0], dtype=dtype)})


def test_shards_written_by_transformers_are_read_in_one_order(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = tiny_model_dir("llama", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(dict(iter_weights(tmp_path)), dict(iter_weights(directory)))
    assert [name for name, _ in iter_weights(tmp_path)] == [name for name, _ in iter_weights(tmp_path)]


def test_weights_outlive_the_file(tiny_model_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir(), directory)
    weights = dict(iter_weights(directory))
    shutil.rmtree(directory)
    assert_same_weights(weights, dict(iter_weights(tiny_model_dir())))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no weights: model.safetensors or"),
        ({"pytorch_model.bin": b"x"}, r"only as pickle \(pytorch_model.bin\).*never read"),
        ({"model.safetensors": b"nonsense"}, "not a readable safetensors"),
        ({"model.safetensors.index.json": b"{}"}, "not a readable index"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "0 shards"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
            r"\['x.safetensors'\] are missing",
        ),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "points to"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "x.bin"}}'}, "points to 'x.bin'"),
    ],
)
def test_a_directory_without_readable_weights_says_why(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(iter_weights(tmp_path))


def test_an_index_that_disagrees_with_its_shard_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "x.safetensors"}}')
    with pytest.raises(ValueError, match=r"disagree about \['a', 'b'\]"):
        list(iter_weights(tmp_path))


def test_a_stored_rotary_table_is_no_weight(tmp_path):
    tensors = {"a": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(dict(iter_weights(tmp_path)), {"a": torch.ones(2)})


def test_integer_weights_are_refused(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"a in .* is torch.int8"):
        list(iter_weights(tmp_path))


# Writing


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_a_saved_model_is_what_transformers_and_we_read_back(tiny_model_dir, tmp_path, family, max_shard_bytes):
    source, saved = tiny_model_dir(family), tmp_path / "out" / "saved"
    tokenizer = load_tokenizer(source)
    save_pretrained(saved, read_config_dict(source), iter_weights(source), tokenizer, max_shard_bytes)
    assert (saved / "model.safetensors").is_file() == (max_shard_bytes > 50_000)
    assert resolve_model(str(saved)) == saved
    assert ModelConfig.from_directory(saved) == ModelConfig.from_directory(source)
    assert_same_weights(dict(iter_weights(saved)), dict(iter_weights(source)))
    assert_same_weights(transformers_weights(saved), transformers_weights(source))
    text = "the sum of 1 + 2\n"
    assert load_tokenizer(saved)(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert load_tokenizer(saved).chat_template == tokenizer.chat_template
    assert [path.name for path in saved.parent.iterdir()] == ["saved"], "nothing temporary is left"


def test_views_of_one_storage_that_need_gradients_are_saved(tmp_path):
    fused = torch.nn.Parameter(torch.arange(24.0).reshape(6, 4))
    views = {"q": fused[:4], "k": fused[4:], "t": fused.t()}
    save_pretrained(tmp_path / "m", {}, views)
    assert_same_weights(dict(iter_weights(tmp_path / "m")), {name: t.detach() for name, t in views.items()})


def test_the_saved_config_names_one_type_that_of_the_weights(tmp_path):
    save_pretrained(tmp_path / "m", {"torch_dtype": "bfloat16", "kept": 1}, {"a": torch.ones(4)})
    assert read_config_dict(tmp_path / "m") == {"kept": 1, "dtype": "float32"}


def test_the_second_name_of_a_tied_embedding_is_not_saved(tmp_path):
    embedding = torch.ones(3, 2)
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    save_pretrained(tmp_path / "tied", {"tie_word_embeddings": True}, weights)
    assert [name for name, _ in iter_weights(tmp_path / "tied")] == ["model.embed_tokens.weight"]


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path):
    directory = tmp_path / "m"
    save_pretrained(directory, {}, {"a": torch.zeros(4), "b": torch.zeros(4)}, max_shard_bytes=16)
    (directory / "notes.txt").write_text("mine")
    save_pretrained(directory, {}, {"a": torch.ones(4)})
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert_same_weights(dict(iter_weights(directory)), {"a": torch.ones(4)})


def test_a_save_that_fails_leaves_nothing(tmp_path):
    def weights():
        yield "a", torch.ones(4)
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        save_pretrained(tmp_path / "m", {}, weights())
    assert list(tmp_path.iterdir()) == []


# Finding


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/directory", "does not exist and is no hub id"),
        ("./nowhere", "does not exist and is no hub id"),
        ("a/b/c", "does not exist and is no hub id"),
        ("nowhere.gguf", "'nowhere.gguf' does not exist"),
    ],
)
def test_a_model_that_is_nowhere_is_named(cache, model, words):
    with pytest.raises(ValueError, match=words):
        resolve_model(model)


def test_a_hub_id_that_cannot_be_fetched_says_what_else_to_give(tmp_path):
    # in a process of its own, because the hub client reads its settings when it is imported
    code = "from engine.checkpoint import resolve_model; resolve_model('no-such-owner/no-such-model')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: model='no-such-owner/no-such-model' is no local directory or .gguf file" in result.stderr
    assert "or give a directory, a .gguf file or 'smollm2-135m-instruct'" in result.stderr


def test_a_file_or_an_empty_directory_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only \.gguf files are read"):
        resolve_model(tmp_path / "model.bin")


# GGUF


def write_gguf(path: Path, source: Path, **metadata: object) -> Path:
    """A GGUF file of a tiny model, with the names and the order of rows that llama.cpp writes."""
    config, tokenizer = ModelConfig.from_directory(source), load_tokenizer(source)
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = [tokenizer.convert_ids_to_tokens(token_id) for token_id in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_layers)
    for name, tensor in iter_weights(source):
        values = tensor.numpy()
        heads = config.num_heads if ".q_proj." in name else config.num_kv_heads
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = values.reshape(heads, 2, config.head_dim // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tiny_model_dir, tmp_path) -> Callable[..., Path]:
    return lambda **metadata: write_gguf(tmp_path / "tiny.gguf", tiny_model_dir(), **metadata)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_a_converted_gguf_is_the_model_it_was_made_from(tiny_model_dir, tmp_path, cache, family, overrides):
    source = tiny_model_dir(family, **overrides)
    converted = resolve_model(write_gguf(tmp_path / "tiny.gguf", source))
    assert converted.is_relative_to(cache)
    assert_same_weights(dict(iter_weights(converted)), dict(iter_weights(source)))
    assert_same_weights(transformers_weights(converted), transformers_weights(source))
    config = ModelConfig.from_directory(converted)
    assert config.rms_norm_eps == pytest.approx(1e-6, rel=1e-6)
    assert ModelConfig.from_directory(source) == ModelConfig.from_dict(
        {**read_config_dict(converted), "rms_norm_eps": 1e-6}
    )
    tokenizer, expected = load_tokenizer(converted), load_tokenizer(source)
    for text in ("the sum of 12 +  25\n\n37 é", "<|im_start|>user\nx<|im_end|>"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token_id == 2


def test_a_gguf_is_converted_once_into_a_private_cache(tiny_gguf, cache, tmp_path):
    path = tiny_gguf()
    directory = resolve_model(path)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE((cache / "models").stat().st_mode) == 0o700
    written = (directory / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "elsewhere" / "tiny.gguf"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert resolve_model(copy) == directory, "keyed by content"
    assert resolve_model(copy.parent) == directory, "a directory with one GGUF file means that file"
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    with copy.open("ab") as file:
        file.write(b"\0")
    assert resolve_model(copy) != directory


def test_a_configuration_is_read_without_converting(tiny_gguf, tiny_model_dir, cache):
    path = tiny_gguf()
    config = read_model_config(path)
    assert not cache.exists()
    assert config == read_model_config(path.parent) == ModelConfig.from_directory(resolve_model(path))
    assert read_model_config(tiny_model_dir()) == ModelConfig.from_directory(tiny_model_dir())
    with pytest.raises(ValueError, match=r"'nowhere\.gguf' does not exist"):
        read_model_config("nowhere.gguf")


def test_two_processes_that_convert_at_once_both_end_well(tiny_gguf, cache):
    path = tiny_gguf()
    abandoned = cache / "models" / ".tiny-0123456789abcdef-left"
    abandoned.mkdir(parents=True)
    code = f"from engine.checkpoint import resolve_model; print(resolve_model({str(path)!r}))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (answer,) = answers
    assert len(dict(iter_weights(answer))) == 20
    assert sorted(path.name for path in (cache / "models").glob("*") if path.is_dir()) == sorted(
        [abandoned.name, Path(answer).name]
    ), "of other models nothing is touched"


def test_a_conversion_that_was_killed_is_made_again(tiny_gguf, cache):
    directory = resolve_model(tiny_gguf())
    shutil.move(directory, directory.parent / f".{directory.name}-killed")
    assert resolve_model(tiny_gguf()) == directory
    assert not list(directory.parent.glob(f".{directory.name}-*"))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "rope scaling from GGUF is not supported"),
        ({"add_rope_dimension_count": 8}, "part of each head"),
        ({"add_expert_count": 8}, "mixture-of-experts"),
        ({"add_sliding_window": 128}, "sliding-window"),
    ],
)
def test_a_gguf_that_needs_other_arithmetic_is_refused(tiny_gguf, cache, metadata, words):
    with pytest.raises(ValueError, match=words):
        resolve_model(tiny_gguf(**metadata))
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]


def test_a_gguf_of_another_architecture_or_none_is_refused(cache, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'gpt2' is not supported: use one of llama"):
        resolve_model(tmp_path / "other.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"not a model at all, whatever its name")
    with pytest.raises(ValueError, match="not a readable GGUF"):
        resolve_model(tmp_path / "broken.gguf")


def test_the_packaged_model_is_found_without_importing_its_package():
    before = set(sys.modules)
    path = model_path_of_package()
    assert path.suffix == ".gguf"
    assert path.stat().st_size > 50_000_000
    assert not {name for name in set(sys.modules) - before if name.startswith("llm")}


@pytest.mark.slow
def test_smollm2_equals_what_transformers_makes_of_the_gguf(smollm2_dir):
    from transformers import AutoModelForCausalLM

    path = model_path_of_package()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert_same_weights(dict(ours.state_dict()), dict(theirs.state_dict()))
    token_ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(ours(token_ids).logits, theirs(token_ids).logits)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert_same_weights(dict(iter_weights(smollm2_dir)), weights)


@pytest.mark.slow
def test_smollm2_in_transformers_continues_a_sum_it_has_seen(smollm2_dir):
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    prompt = tokenizer("12 + 25 = 37\n7 + 18 = 25\n20 + 6 = 26\n3 + 4 =", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == " 7\n"


@pytest.mark.slow
def test_smollm2_tokenizer_splits_digits_and_round_trips(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    text = "12 + 25 =  37\n\n100 é 你好 \t<|im_end|>"
    token_ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(token_ids) == text
    assert token_ids[-1] == 2
    assert [tokenizer.decode([token_id]) for token_id in tokenizer("a  12\n\n3")["input_ids"]] == [
        "a", "  ", "1", "2", "\n\n", "3",
    ]  # fmt: skip
