"""Tokenizer: turns a prompt (text, token ids or chat messages) into token ids, and finds the tokenizer of a model."""

from __future__ import annotations

import importlib.metadata
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[Mapping[str, object]]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored in a model directory, or None where it holds none (prompts are token ids then).

    Never runs code from the directory and never asks the network.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    check_foreign_kernels()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(directory), config=_plain_config(directory), trust_remote_code=False, local_files_only=True
    )


def _plain_config(directory: Path) -> PreTrainedConfig | None:
    """What AutoTokenizer asks of a model's configuration where the tokenizer names its own class; else None.

    It would import the family's configuration class for it, and with that torch's compiler: seconds at every start.
    """
    try:
        tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        model_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    if not tokenizer_config.get("tokenizer_class") or not model_config.get("model_type"):
        return None
    from transformers.configuration_utils import PreTrainedConfig

    config = PreTrainedConfig()
    for name in ("model_type", "model_name", "tokenizer_class", "_name_or_path"):
        if name in model_config:
            setattr(config, name, model_config[name])
    return config


def encode(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, vocab_size: int | None = None) -> list[int]:
    """The token ids of a prompt: text as the tokenizer reads it, ids as they are, chat messages by the chat template.

    `vocab_size` is the model's number of embedding rows; without it the tokenizer's own size is the limit.
    Raises ValueError for an empty prompt, ids outside the vocabulary, and whatever is no prompt at all.
    """
    if isinstance(prompt, str):
        token_ids = _encode_text(tokenizer, prompt)
    elif isinstance(prompt, (bytes, Mapping)):
        raise ValueError(f"prompt={prompt!r} must be text, token ids, or a list of chat messages")
    else:
        token_ids = _encode_list(tokenizer, list(prompt))
    if not token_ids:
        raise ValueError(f"prompt={prompt!r} is empty: a prompt needs at least one token")
    if vocab_size is None and tokenizer is not None:
        vocab_size = len(tokenizer)
    _check_token_ids(token_ids, vocab_size)
    return token_ids


def check_foreign_kernels() -> None:
    """Raises RuntimeError where a distribution called `kernels` is installed that is not this project's package.

    transformers takes whatever `kernels` imports for that distribution and fails to import model classes; and which
    of the two packages `import kernels` finds depends on the order of sys.path.
    """
    try:
        foreign = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise RuntimeError(
        f"the distribution 'kernels' {foreign.version} is installed at {foreign.locate_file('')}: transformers would "
        "mix it up with this project's package of that name. Remove it (pip uninstall kernels) or use an environment "
        "without it"
    )


def _encode_text(tokenizer: PreTrainedTokenizerBase | None, text: str) -> list[int]:
    if not text:
        raise ValueError("the prompt is an empty string: a prompt needs at least one token")
    if tokenizer is None:
        raise ValueError("this model directory has no tokenizer: give prompts as lists of token ids")
    return list(tokenizer(text)["input_ids"])


def _encode_list(tokenizer: PreTrainedTokenizerBase | None, items: list) -> list[int]:
    if items and all(isinstance(item, Mapping) for item in items):
        return _encode_messages(tokenizer, items)
    token_ids = []
    for item in items:
        try:
            token_ids.append(operator.index(item))
        except TypeError:
            raise ValueError(
                f"{item!r} in a prompt is neither a token id nor, as all would have to be, a message"
            ) from None
        if isinstance(item, bool):
            raise ValueError(f"{item!r} in a prompt is not a token id")
    return token_ids


def _encode_messages(tokenizer: PreTrainedTokenizerBase | None, messages: list[Mapping[str, object]]) -> list[int]:
    from jinja2 import TemplateError

    for message in messages:
        if "role" not in message or "content" not in message:
            raise ValueError(f"chat message {message!r} must have 'role' and 'content'")
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("this model has no chat template: give the prompt as text or token ids")
    try:
        token_ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    return list(token_ids)


def _check_token_ids(token_ids: list[int], vocab_size: int | None) -> None:
    lowest, highest = min(token_ids), max(token_ids)
    if lowest < 0:
        raise ValueError(f"token id {lowest} in a prompt is negative")
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(f"token id {highest} in a prompt is outside the vocabulary of {vocab_size} tokens")
