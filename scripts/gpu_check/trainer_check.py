"""Trainer check: an engine and a GRPO trainer on one device, update after update, without a bit between them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine import LLMEngine, SamplingParams
from engine.checkpoint import save_pretrained
from rollout import Rollout
from scripts.gpu_check.random_models import MODELS, TINY, random_engine, random_weights
from scripts.gpu_check.report import Row
from trainers import GRPOConfig, LossOutput, PackedBatch, Policy, pack
from trainers.grpo_actor import GRPOActor

SMALL = {**MODELS["qwen3-0.6b"], "num_hidden_layers": 4}
NUM_ROUNDS, GROUP_SIZE = 4, 8
PROMPT_LENGTHS = (3, 40, 150, 300)
PARAMS = SamplingParams(n=GROUP_SIZE, max_tokens=48, temperature=0.9, ignore_eos=True)


def trainer_rows(rows: list[Row]) -> None:
    """A row for each round in both profiles: passed if no log-probability differs and gradients repeat."""
    for name, model, numerics in (("qwen3 of 4 layers", SMALL, "bfloat16"), ("tiny llama", TINY, "float32")):
        for row in trainer_rounds(model, numerics, "cuda", PROMPT_LENGTHS, PARAMS, NUM_ROUNDS):
            rows.append({"model": name, "numerics": numerics, **row})


def trainer_rounds(
    model: Mapping[str, Any],
    numerics: str,
    device: str,
    prompt_lengths: Sequence[int],
    params: SamplingParams,
    num_rounds: int,
) -> Iterator[Row]:
    """Draws, trains and syncs `num_rounds` times. params: with n of at least 2."""
    engine = random_engine(model, device=device, numerics=numerics, num_blocks=1200, max_num_seqs=64, max_model_len=512)
    trainer = start_trainer(model, numerics, device, engine)
    for number in range(num_rounds):
        rollouts = draw(engine, prompt_lengths, params, seed=number)
        advantages = [1.0 - 2.0 * (i % 2) for i in range(len(rollouts))]
        is_repeatable = gradients_repeat(trainer.policy, pack(rollouts, advantages))
        began = time.perf_counter()
        metrics = trainer.step(rollouts, advantages)
        trained = time.perf_counter()
        trainer.sync()
        engine.check_integrity()
        mismatch = metrics["mismatch/logprob_abs_diff_max"]
        yield {
            "round": number, "tokens": metrics["mismatch/num_tokens"], "mismatch": mismatch,
            "grad_norm": metrics["actor/grad_norm"], "gradients_repeat": is_repeatable,
            "step_s": trained - began, "sync_s": time.perf_counter() - trained,
            "passed": mismatch == 0.0 and metrics["actor/grad_norm"] > 0 and is_repeatable
            and engine.policy_version == number + 1,
        }  # fmt: skip


class EngineHandle:
    """Stands where a pool's handle does: one engine of this process takes the weights."""

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine

    def sync_weights(self, named_tensors: Any, policy_version: int, mode: Any) -> Any:
        return self.engine.update_weights(named_tensors, policy_version, mode)


def start_trainer(model: Mapping[str, Any], numerics: str, device: str, engine: LLMEngine) -> GRPOActor:
    """A trainer with the weights that `random_engine` gave the engine."""
    config = GRPOConfig(learning_rate=1e-3, warmup_steps=0, micro_batch_tokens=1024, max_tokens=PARAMS.max_tokens)
    weights = random_weights(engine.weight_shapes(), "cuda" if device == "cuda" else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(Path(directory) / "model", model, weights)
        return GRPOActor(str(Path(directory) / "model"), numerics, config, EngineHandle(engine), device)


def draw(engine: LLMEngine, prompt_lengths: Sequence[int], params: SamplingParams, seed: int) -> list[Rollout]:
    """A group of each prompt, whose ids and samples depend on the seed."""
    generator, vocab_size = torch.Generator().manual_seed(seed), engine.model_config.vocab_size
    prompts = [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in prompt_lengths]
    for p, prompt in enumerate(prompts):
        engine.add_request(f"{seed}-{p}", prompt, params)
    completions = []
    while engine.has_unfinished():
        completions += engine.step().finished
    completions.sort(key=lambda one: (one.request_id, one.index))
    return [
        Rollout(
            group_id=one.request_id,
            index=one.index,
            prompt_token_ids=prompts[int(one.request_id.split("-")[1])],
            token_ids=one.token_ids,
            logprobs=one.logprobs,
            policy_versions=one.policy_versions,
            finish_reason=one.finish_reason,
            stop_reason=one.stop_reason,
            text=one.text,
            loss_mask=[1] * len(one.token_ids),
            seed=seed,
            sampling_params=params,
            is_exact=True,
            kernel_fingerprint=engine.kernel_fingerprint,
            metadata={},
        )
        for one in completions
    ]


def gradients_repeat(policy: Policy, batch: PackedBatch) -> bool:
    """Whether a second backward gives the same bits, also where several tokens follow one row."""
    first, second = gradients(policy, batch), gradients(policy, batch)
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def gradients(policy: Policy, batch: PackedBatch) -> list[torch.Tensor]:
    policy.forward_backward(
        batch, lambda logprobs, batch: LossOutput(loss=(logprobs * batch.advantages).mean(), metrics={})
    )
    found = [parameter.grad.clone() for parameter in policy.model.parameters()]
    policy.optimizer.zero_grad()
    return found
