"""Policy: the trained model - the engine's own Transformer with float32 masters, its optimiser and its version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

import kernels
from engine.attention import PackedAttention
from engine.checkpoint import iter_weights, resolve_model, save_pretrained
from engine.computation import Computation, Device, Numerics
from engine.config import available_cores
from engine.model import DecoderLayer, NamedTensors, Transformer
from engine.model_config import ModelConfig, read_config_dict
from engine.ops import Ops, make_ops
from engine.tokenizer import encode, load_tokenizer
from trainers.batch import PackedBatch, pack_tokens
from trainers.choices import TrainerParallelism
from trainers.losses import LossOutput
from trainers.optimizer import MasterOptimizer
from trainers.ranks import COLLECTIVE_SECONDS, NamedTensor, make_ranks, require_ranks_on_cpu, start_accelerator
from trainers.recomputation import RecomputedLayer
from trainers.schedule import LearningRateSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FOLDER, OPTIMIZER_FILE = "model", "optimizer.safetensors"  # of a checkpoint

LossFunction = Callable[[torch.Tensor, PackedBatch], LossOutput]
"""(trainer_logprobs [C] with gradient, batch) -> this batch's share of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardOutput:
    """What one forward_backward saw."""

    logprobs: torch.Tensor  # [C] float32, CPU, of this very forward
    metrics: dict[str, float]  # of the loss function


class Policy:
    """A model in training.

    model: a directory, hub id or GGUF file, as EngineConfig takes it. numerics, device: of the forward pass, as
    EngineConfig takes them, and they must be the engine's; masters, gradients and optimiser are float32 in each and lie
    on the device, batches and losses on the CPU. num_threads: CPU threads for both our kernels and torch's; None takes
    every core this process may use. gradient_checkpointing: layers compute their forward again in the backward pass.
    The other settings are MasterOptimizer's.

    Where the environment names several ranks (ranks.py), each is a process with a Policy and all call the same methods
    with micro-batches of their own; parallelism says what they share, collective_seconds how long one waits for the
    others. Log-probabilities are the same bits as with one rank; gradients differ in their last bits. Several ranks
    train on the CPU only.

    `save_checkpoint` and `load_checkpoint` carry all that a Policy is from one process to another, to the bit: weights,
    moments, policy_version, and the number of updates, which is the place in the schedule.
    """

    def __init__(
        self,
        model: str,
        *,
        numerics: Numerics = "auto",
        device: Device = "auto",
        learning_rate: float = 3e-6,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 3,
        learning_rate_schedule: LearningRateSchedule = "constant",
        num_optimizer_steps: int | None = None,
        num_threads: int | None = None,
        parallelism: TrainerParallelism = "ddp",
        gradient_checkpointing: bool = False,
        collective_seconds: float = COLLECTIVE_SECONDS,
    ) -> None:
        self.num_threads = num_threads or available_cores()
        kernels.set_num_threads(self.num_threads)
        torch.set_num_threads(self.num_threads)
        ops = make_ops(numerics, device)
        self.kernel_fingerprint: str = ops.fingerprint()
        self.directory = resolve_model(model)
        self.ranks = make_ranks(start_accelerator(collective_seconds), parallelism)
        require_ranks_on_cpu(self.ranks.num_ranks, Computation.resolve(numerics, device).device_name)
        self.ranks.require_equal("kernel fingerprints", self.kernel_fingerprint)
        self.ranks.require_equal("num_threads", self.num_threads)  # bits of the gradient's norm depend on them
        self.model = load_transformer(
            self.directory, ops, with_masters=True, gradient_checkpointing=gradient_checkpointing
        )
        self.ranks.prepare(self.model, self.model.layers)
        self.optimizer = MasterOptimizer(
            [(self.model.parameters(), learning_rate)],
            betas=betas,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            warmup_steps=warmup_steps,
            learning_rate_schedule=learning_rate_schedule,
            num_optimizer_steps=num_optimizer_steps,
            ranks=self.ranks,
        )
        self.policy_version = 0  # of the weights as others may have them

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's, None where it has none; read when it is first needed."""
        return load_tokenizer(self.directory)

    def token_logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities of the batch's targets, [C] float32 on the CPU, differentiable."""
        logprobs = packed_logprobs(self.model, batch)
        self.ranks.end_forward(self.model)
        return logprobs

    def forward_backward(self, batch: PackedBatch, loss_fn: LossFunction) -> ForwardBackwardOutput:
        """One forward and backward; gradients add up until optim_step."""
        logprobs = self.token_logprobs(batch)
        output = loss_fn(logprobs, batch)
        self.optimizer.backward(output.loss)
        return ForwardBackwardOutput(logprobs=logprobs.detach(), metrics=output.metrics)

    def optim_step(self, *, is_new_version: bool = True) -> dict[str, float]:
        """Clip the gradient, move the masters, repack them for the kernels; policy_version + 1.

        is_new_version: False for all but the last of several steps on one batch. Nobody draws under the weights in
        between, so the number of versions that a token is old counts batches.
        """
        self.ranks.reduce_gradients(self.model)
        grad_norm, learning_rate = self.optimizer.step()
        self.ranks.repack(self.model)
        self.policy_version += is_new_version
        return {"actor/grad_norm": grad_norm, "actor/lr": learning_rate}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, float32 tensor on the device) of every weight, ready for RolloutPool.sync_weights."""
        return self.ranks.named_weights(self.model)

    def load_weights(self, named_tensors: NamedTensors) -> bytes:
        """Replaces every weight by float tensors under Hugging Face names; see Transformer.load_weights."""
        return self.ranks.load_weights(self.model, named_tensors)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, safetensors and the tokenizer, as Hugging Face lays them out; rank 0 does."""
        self.ranks.lead(self.named_weights(), lambda weights: self._write_pretrained(Path(directory), weights))

    def checkpoint_num_bytes(self) -> int:
        """What `save_checkpoint` writes, the tokenizer and other small files aside."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters())  # the weights and two moments

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write weights (`model/`, in Hugging Face format, float32) and optimiser into an existing directory.

        Rank 0 writes; any number of ranks may load. Raises OSError, on rank 0, where the disk does not take them.
        """
        weights = self.named_weights()
        moments = self.optimizer.tensors(dict(self.model.named_parameters()))
        # as one exchange: where rank 0 cannot write the weights, the others are not left waiting with the moments
        self.ranks.lead(chain(weights, moments), lambda tensors: self._write_checkpoint(Path(directory), tensors))

    def load_checkpoint(self, directory: str | Path) -> None:
        """Take weights, moments and policy_version from what `save_checkpoint` wrote, on whichever device.

        Every rank reads them. Raises ValueError where they are another model's, or not readable; the policy is then
        not to be used any more.
        """
        self.load_weights(iter_weights(Path(directory) / MODEL_FOLDER))
        counters = self.optimizer.load(Path(directory) / OPTIMIZER_FILE, dict(self.model.named_parameters()))
        self.policy_version = counters["policy_version"]

    @torch.no_grad()
    def expected_reward(
        self, prompts: Sequence[Any], answers: Sequence[str | Sequence[str]], max_tokens: int = 1024
    ) -> float:
        """The exact probability that a sample at temperature 1 is right, averaged over prompts.

        prompts: as the engine takes them. answers: for each, the whole completion that counts as right, the stop
        included (" 37\\n"), or several such texts, whose probabilities add up. A text counts under the tokens that
        the tokenizer gives it; other spellings of the same text are left out, so this is a lower bound where a model
        uses them. max_tokens: rows of one forward.
        """
        if len(prompts) != len(answers) or not prompts:
            raise ValueError(f"{len(prompts)} prompts with {len(answers)} answers: give one answer for each prompt")
        prompt_ids = [encode(self.tokenizer, prompt, self.model.config.vocab_size) for prompt in prompts]
        answer_ids = [self._encode_answers(answer) for answer in answers]
        return sum(self._probability(p, a) for p, a in _chunks(prompt_ids, answer_ids, max_tokens)) / len(prompts)

    def _write_checkpoint(self, directory: Path, tensors: Iterator[NamedTensor]) -> None:
        """tensors: all weights, then the optimiser's."""
        parameters = dict(self.model.named_parameters())
        with safetensors_errors():
            self._write_pretrained(directory / MODEL_FOLDER, islice(tensors, len(self.model.weight_shapes())))
            self.optimizer.save(directory / OPTIMIZER_FILE, parameters, tensors, policy_version=self.policy_version)

    def _write_pretrained(self, directory: Path, weights: Iterator[NamedTensor]) -> None:
        save_pretrained(directory, read_config_dict(self.directory), weights, self.tokenizer)

    def _probability(self, prompts: list[list[int]], answers: list[list[list[int]]]) -> float:
        """Summed probability of the answers of some prompts."""
        batch = pack_tokens(prompts, answers)
        logprobs = self.token_logprobs(batch).double()
        num_answers = sum(map(len, answers))
        totals = torch.zeros(num_answers, dtype=torch.float64).index_add_(0, batch.sample_index, logprobs)
        return totals.exp().sum().item()

    def _encode_answers(self, answers: str | Sequence[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise ValueError(f"{self.directory} has no tokenizer, which the texts of right answers need")
        texts = [answers] if isinstance(answers, str) else list(dict.fromkeys(answers))
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if not ids or not all(ids):
            raise ValueError(f"answers={answers!r}: every right completion needs at least one token")
        return ids


@contextmanager
def safetensors_errors() -> Iterator[None]:
    """What safetensors calls by a name of its own, such as a full disk, is the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_transformer(
    directory: Path, ops: Ops, *, with_masters: bool, gradient_checkpointing: bool = False
) -> Transformer:
    """The model of a directory on the device of its ops, with float32 masters to train or with packed weights alone."""
    config = ModelConfig.from_directory(directory)
    layer_type = RecomputedLayer if gradient_checkpointing else DecoderLayer
    model = Transformer(config, ops=ops, with_masters=with_masters, layer_type=layer_type)
    model.load_weights(iter_weights(directory))
    return model


def packed_logprobs(model: Transformer, batch: PackedBatch) -> torch.Tensor:
    """Log-probabilities of a packed batch's targets, [C] float32 on the CPU; the logits never exist all at once.

    The batch lies on the CPU, the model computes on its own device, and gradients flow back the same way.
    """
    hidden_CD, head, device = packed_hidden(model, batch), model.lm_head, model.ops.device
    target_ids, temperature = batch.target_ids.to(device), batch.temperature.to(device)
    return model.ops.token_logprobs(
        hidden_CD, head.packed, head.num_outputs, target_ids, temperature, head.master
    ).cpu()


def packed_hidden(model: Transformer, batch: PackedBatch) -> torch.Tensor:
    """Final hidden states [C, D], on the model's device, of the rows before a packed batch's targets."""
    ops, device = model.ops, model.ops.device
    attention = PackedAttention.from_segments(model.config, batch.segments, ops)
    hidden_TD = model(batch.input_ids.to(device), batch.positions.to(device), attention)
    return ops.select_rows(hidden_TD, batch.target_rows.to(device))


def _chunks(
    prompts: list[list[int]], answers: list[list[list[int]]], max_tokens: int
) -> Iterator[tuple[list[list[int]], list[list[list[int]]]]]:
    """Runs of prompts of at most max_tokens rows together (a larger one alone)."""
    start, num_rows = 0, 0
    for i, (prompt, options) in enumerate(zip(prompts, answers, strict=True)):
        cost = len(prompt) + sum(len(ids) - 1 for ids in options)
        if i > start and num_rows + cost > max_tokens:
            yield prompts[start:i], answers[start:i]
            start, num_rows = i, 0
        num_rows += cost
    yield prompts[start:], answers[start:]
