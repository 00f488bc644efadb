"""What the tests share: the packaged SmolLM2, tiny random models of every supported family, and one Ray."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from engine.checkpoint import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every test that starts a process
if not torch.cuda.is_available():
    # Read when triton is first imported: the GPU kernels' tests then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A suite that was started in the background ignores Ctrl-C, and so would every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
TINY_VOCAB_SIZE = 320
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog\n",
    "and then the other one answers that there is nothing to see\n",
    "what is the sum of these numbers? it is here: \n",
    "system\nuser\nassistant\n",
]


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The packaged SmolLM2-135M-Instruct as a Hugging Face directory; converted once per machine."""
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests that need one; pools that find it running leave it running."""
    import ray

    from rollout import cluster

    has_started = cluster.connect(weights_bytes=0, num_cpus=2)
    yield
    if has_started and ray.is_initialized():
        cluster.disconnect()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of tiny random models: `tiny_model_dir("qwen3", num_attention_heads=9, num_key_value_heads=3)`.

    Overrides are entries of the family's transformers config, and `weights_seed`. The same arguments give the same
    directory within a test session, so tests must not write to it.
    """
    made: dict[tuple, Path] = {}

    def make(family: str = "llama", *, weights_seed: int = 0, **overrides: Any) -> Path:
        key = (family, weights_seed, repr(sorted(overrides.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"tiny-{family}") / "model"
            _save_tiny_model(made[key], family, weights_seed, overrides)
        return made[key]

    return make


def _save_tiny_model(directory: Path, family: str, weights_seed: int, overrides: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    options = {
        "vocab_size": TINY_VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "mistral":
        options["sliding_window"] = None
    if family == "smollm3":
        options["no_rope_layer_interval"] = 2  # else none of so few layers would be without rope
    options.update(overrides)
    if "hidden_size" not in overrides and options["hidden_size"] % options["num_attention_heads"]:
        # transformers wants the width to be a multiple of the heads, which 64 is not of 9 or 14
        options["hidden_size"] = options["head_dim"] * options["num_attention_heads"]
    disable_progress_bar()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    _spread_weights(model, weights_seed)
    model.save_pretrained(directory)
    _tiny_tokenizer().save_pretrained(directory)


def _spread_weights(model: torch.nn.Module, seed: int) -> None:
    """Weights of a size at which attention looks around and next-token distributions are neither flat nor certain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(2 / math.sqrt(parameter.shape[1]) * noise)
            else:
                parameter.copy_(1.5 / math.sqrt(parameter.shape[1]) * noise)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits and a token for the newline, learned on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL_TOKENS[2], pad_token=_SPECIAL_TOKENS[0]
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped
