"""Policy: the trained model - the engine's own Transformer with float32 masters, its optimiser and its version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kernels
from engine.attention import PackedAttention
from engine.checkpoint import iter_weights, resolve_model, save_pretrained
from engine.config import available_cores
from engine.model import DecoderLayer, NamedTensors, Transformer
from engine.model_config import ModelConfig, read_config_dict
from engine.tokenizer import encode, load_tokenizer
from trainers.batch import PackedBatch, idle_batch, pack_tokens
from trainers.losses import LossOutput
from trainers.ranks import COLLECTIVE_SECONDS, Parallelism, make_ranks, start_accelerator
from trainers.recomputation import RecomputedLayer

LossFunction = Callable[[torch.Tensor, PackedBatch], LossOutput]
"""(trainer_logprobs [C] with gradient, batch) -> this batch's share of the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBackwardOutput:
    """What one forward_backward saw."""

    logprobs: torch.Tensor  # [C] float32, of this very forward
    metrics: dict[str, float]  # of the loss function


class Policy:
    """A model in training.

    model: a directory, hub id or GGUF file, as EngineConfig takes it. numerics: the profile of the forward pass, which
    must be the engine's; masters, gradients and optimiser are float32 in each. num_threads: CPU threads for both our
    kernels and torch's; None takes every core this process may use. The learning rate rises linearly over warmup_steps,
    the first step taking 1 / warmup_steps of it. gradient_checkpointing: layers keep their inputs alone for the
    backward pass and compute the rest again, to the same bits.

    Where the environment says that this process is one of several ranks (docs/trainer_ranks.md), every method is called
    on all of them, with the same number of batches. parallelism: "ddp", each rank holds everything, or "fsdp", masters,
    gradients and moments are sharded. collective_seconds: how long a rank waits for the others before it raises.
    """

    def __init__(
        self,
        model: str,
        *,
        numerics: str = "float32",
        learning_rate: float = 3e-6,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 3,
        num_threads: int | None = None,
        parallelism: Parallelism = "ddp",
        gradient_checkpointing: bool = False,
        collective_seconds: float = COLLECTIVE_SECONDS,
    ) -> None:
        self.num_threads = num_threads or available_cores()
        kernels.set_num_threads(self.num_threads)
        torch.set_num_threads(self.num_threads)
        self.kernel_fingerprint: str = kernels.fingerprint(numerics)
        self.directory = resolve_model(model)
        self.tokenizer = load_tokenizer(self.directory)
        self.accelerator = start_accelerator(collective_seconds)
        self.ranks = make_ranks(self.accelerator, parallelism)
        self.ranks.require_equal("kernel fingerprints", self.kernel_fingerprint)
        self.ranks.require_equal("num_threads", self.num_threads)  # bits of the gradient's norm depend on them
        layer_type = RecomputedLayer if gradient_checkpointing else DecoderLayer
        self.model = load_transformer(self.directory, numerics, with_masters=True, layer_type=layer_type)
        self.ranks.prepare(self.model)
        self.learning_rate, self.warmup_steps, self.max_grad_norm = learning_rate, warmup_steps, max_grad_norm
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                self.model.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True
            )
        )
        self.policy_version = 0

    def token_logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities of the batch's targets, [C] float32, differentiable."""
        logprobs = packed_logprobs(self.model, batch)
        self.ranks.end_forward(self.model)
        return logprobs

    def forward_backward(self, batch: PackedBatch, loss_fn: LossFunction) -> ForwardBackwardOutput:
        """One forward and backward; gradients add up until optim_step."""
        logprobs = self.token_logprobs(batch)
        output = loss_fn(logprobs, batch)
        self.accelerator.backward(output.loss)
        return ForwardBackwardOutput(logprobs=logprobs.detach(), metrics=output.metrics)

    def optim_step(self) -> dict[str, float]:
        """Clip the gradient, move the masters, repack them for the kernels; policy_version + 1."""
        self.ranks.reduce_gradients(self.model)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        grad_norm = float(self.ranks.full(norm))
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"gradient norm {grad_norm} at policy version {self.policy_version}: the weights were left as they "
                f"were; lower learning_rate={self.learning_rate} or look at the rewards"
            )
        learning_rate = self._current_learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ranks.repack(self.model)
        self.policy_version += 1
        return {"actor/grad_norm": grad_norm, "actor/lr": learning_rate}

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, float32 tensor) of every weight, ready for RolloutPool.sync_weights."""
        return self.ranks.named_weights(self.model)

    def load_weights(self, named_tensors: NamedTensors) -> bytes:
        """Replaces every weight by float tensors under Hugging Face names; see Transformer.load_weights."""
        return self.ranks.load_weights(self.model, named_tensors)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json, safetensors and the tokenizer, as Hugging Face lays them out; rank 0 does."""
        config = read_config_dict(self.directory)
        self.ranks.lead(
            self.named_weights(), lambda weights: save_pretrained(Path(directory), config, weights, self.tokenizer)
        )

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
        return sum(self._probabilities(list(_chunks(prompt_ids, answer_ids, max_tokens)))) / len(prompts)

    def _probabilities(self, chunks: list[tuple[list[list[int]], list[list[list[int]]]]]) -> list[float]:
        """The probability of each chunk; ranks take them in turns, and pass where their turns run out."""
        rank, num_ranks = self.ranks.rank, self.ranks.num_ranks
        own = [self._probability(*chunk) for chunk in chunks[rank::num_ranks]]
        if len(own) * num_ranks < len(chunks):
            self.token_logprobs(idle_batch())
        shares = self.ranks.gather(own)
        return [shares[i % num_ranks][i // num_ranks] for i in range(len(chunks))]

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

    def _current_learning_rate(self) -> float:
        return self.learning_rate * min(1.0, (self.policy_version + 1) / max(1, self.warmup_steps))


def load_transformer(
    directory: Path, numerics: str, with_masters: bool, layer_type: type[DecoderLayer] = DecoderLayer
) -> Transformer:
    """The model of a directory, with float32 masters to train or with packed weights alone."""
    config = ModelConfig.from_directory(directory)
    model = Transformer(config, numerics, with_masters=with_masters, layer_type=layer_type)
    model.load_weights(iter_weights(directory))
    return model


def packed_logprobs(model: Transformer, batch: PackedBatch) -> torch.Tensor:
    """Log-probabilities of a packed batch's targets, [C] float32; the logits of the batch never exist at once."""
    attention = PackedAttention.from_segments(model.config, batch.segments, model.ops)
    hidden_TD = model(batch.input_ids, batch.positions, attention)
    hidden_CD, head = hidden_TD.index_select(0, batch.target_rows), model.lm_head
    return model.ops.token_logprobs(
        hidden_CD, head.packed, head.num_outputs, batch.target_ids, batch.temperature, head.master
    )


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
