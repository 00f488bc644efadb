"""Our losses and advantages against the arithmetic of TRL's own trainers, run on the same numbers.

TRL's methods are called unbound on a stand-in that holds just what they read, so no model is made.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from trainers.advantages import group_advantages
from trainers.corrections import correction_weights
from trainers.losses import add_losses, kl_loss, policy_loss, token_weights
from trainers.packed import sample_sums
from trainers.penalties import overlong_penalty

NUM_GROUPS, GROUP_SIZE, MAX_TOKENS = 3, 4, 9
NUM_SAMPLES = NUM_GROUPS * GROUP_SIZE
NAN = float("nan")


class Tokens:
    """Random padded log-probabilities [B, T] as TRL has them; `packed` gives them as we have them."""

    def __init__(self, seed: int, spread: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise() -> torch.Tensor:
            return spread * torch.randn(NUM_SAMPLES, MAX_TOKENS, generator=generator, dtype=torch.float64)

        lengths = torch.randint(1, MAX_TOKENS + 1, (NUM_SAMPLES, 1), generator=generator)
        self.mask = (torch.arange(MAX_TOKENS) < lengths).long()
        self.old = -2.0 + noise()
        self.new, self.reference = self.old + noise(), self.old + noise()
        self.sampling = (self.old + noise()).float().double()  # TRL makes float32 of what an engine reports
        self.advantages = torch.randn(NUM_SAMPLES, generator=generator, dtype=torch.float64)
        self.rewards = torch.randint(0, 3, (NUM_SAMPLES,), generator=generator).float()
        self.sample_index = torch.arange(NUM_SAMPLES)[:, None].expand(-1, MAX_TOKENS)[self.mask.bool()].int()
        self.num_tokens = int(self.mask.sum())
        self.ones = torch.ones(self.num_tokens, dtype=torch.float64)

    def packed(self, padded: torch.Tensor) -> torch.Tensor:
        return padded[self.mask.bool()]

    @property
    def packed_advantages(self) -> torch.Tensor:
        return self.packed(self.advantages[:, None].expand(-1, MAX_TOKENS))

    def trl_inputs(self, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        prompts = torch.ones(NUM_SAMPLES, 1, dtype=torch.long)
        return {
            "prompt_ids": prompts,
            "prompt_mask": prompts,
            "completion_ids": torch.ones_like(self.mask),
            "completion_mask": self.mask,
            "old_per_token_logps": self.old,
            "old_logps": (self.old * self.mask).sum(1),
            "ref_per_token_logps": self.reference,
            "advantages": self.advantages,
            "num_items_in_batch": self.mask.sum(),
            **more,
        }


def trl_trainer(logprobs: torch.Tensor, **settings: object) -> SimpleNamespace:
    """What TRL's loss and scoring methods read of a trainer; `logprobs` stands for the model's forward."""
    accelerator = SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    args = SimpleNamespace(
        delta=settings.pop("delta", None),
        use_bias_correction_kl=False,
        steps_per_generation=1,
        per_device_train_batch_size=NUM_SAMPLES,
        gradient_accumulation_steps=1,
        gradient_checkpointing_kwargs=None,
    )
    plain = {
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "ref_model": "reference",
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, -logprobs.detach(), None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    return SimpleNamespace(accelerator=accelerator, args=args, **(plain | settings))


def trl_scorer(tokens: Tokens, rewards: torch.Tensor, **settings: object) -> SimpleNamespace:
    """A stand-in that has drawn the tokens and rewards before TRL's scoring method runs."""
    lengths = tokens.mask.sum(1).tolist()
    ids = [[1] * length for length in lengths]
    sampled = [row[:length].tolist() for row, length in zip(tokens.sampling, lengths)]

    def generate(prompts: list[str]) -> tuple[object, ...]:
        has_sampled = settings.get("use_vllm", False)
        drawn = ([[1]] * NUM_SAMPLES, ids, None, ["x"] * NUM_SAMPLES, sampled if has_sampled else None, {}, None, None)
        return drawn if settings["kind"] == "grpo" else (drawn[0], drawn[1], drawn[3])

    trainer = trl_trainer(tokens.old, **settings)
    scoring = {
        "environment_factories": None,
        "tools": None,
        "environments": None,
        "_generate": generate,
        "_get_per_token_logps_and_entropies": lambda model, *_, **__: (
            (tokens.reference if model == "reference" else tokens.old)[:, : max(lengths)],
            None,
            None,
        ),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "num_iterations": 1,
        "num_generations": GROUP_SIZE,
        "reward_weights": torch.ones(1),
        "reward_funcs": [None],
        "reward_func_names": ["reward"],
        "reward_clip_range": None,
        "scale_rewards": "group",
        "normalize_advantages": False,
        "multi_objective_aggregation": "sum_then_normalize",
        "_calculate_rewards": lambda *_: rewards[:, None],
        "_logs": defaultdict(list, rewards=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "log_multimodal": False,
    }
    vars(trainer).update(scoring | settings)
    return trainer


def scored(trainer_class: type, tokens: Tokens, rewards: torch.Tensor, **settings: object) -> dict[str, torch.Tensor]:
    kind = "grpo" if trainer_class is GRPOTrainer else "rloo"
    trainer = trl_scorer(tokens, rewards, kind=kind, **settings)
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": "x"}] * NUM_SAMPLES)


def our_loss(tokens: Tokens, new: torch.Tensor, aggregation: str, kl_coef: float = 0.0, **settings: object):
    weights = token_weights(
        tokens.ones,
        aggregation,
        num_tokens=tokens.num_tokens,
        num_samples=NUM_SAMPLES,
        sample_index=tokens.sample_index,
        max_tokens=MAX_TOKENS,
    )
    logprobs = tokens.packed(new)
    loss = policy_loss(
        logprobs,
        tokens.packed(tokens.old),
        tokens.packed_advantages,
        tokens.ones,
        num_tokens=tokens.num_tokens,
        weights=weights,
        sample_index=tokens.sample_index,
        **settings,
    )
    reference = tokens.packed(tokens.reference)
    counts = {"num_tokens": tokens.num_tokens, "weights": weights}
    return add_losses(loss, kl_loss(logprobs, reference, tokens.ones, kl_coef=kl_coef, **counts)) if kl_coef else loss


def assert_same(ours: torch.Tensor, our_input: torch.Tensor, theirs: torch.Tensor, their_input: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    ours.backward()
    theirs.backward()
    assert their_input.grad.abs().sum() > 0
    torch.testing.assert_close(our_input.grad, their_input.grad, rtol=1e-9, atol=1e-9)


CASES = {
    "grpo": ("seq-mean-token-mean", {}, {"loss_type": "grpo"}),
    "bnpo": ("token-mean", {}, {"loss_type": "bnpo"}),
    "dr_grpo": ("seq-mean-token-sum-norm", {}, {"loss_type": "dr_grpo"}),
    "dapo": ("token-mean", {"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": (
        "token-mean",
        {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.2},
        {"loss_type": "cispo", "epsilon_high": 1.2},
    ),
    "two-sided clip": ("token-mean", {"dual_clip": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
    "gspo": (
        "seq-mean-token-mean",
        {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.04},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.04},
    ),
    "gspo over tokens": (
        "token-mean",
        {"ratio_level": "sequence", "clip_low": 0.05, "clip_high": 0.05},
        {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05},
    ),
    "grpo with kl": ("seq-mean-token-mean", {"kl_coef": 0.3}, {"beta": 0.3}),
    "dapo with kl": ("token-mean", {"kl_coef": 0.3}, {"loss_type": "dapo", "beta": 0.3}),
    "dr_grpo with kl": ("seq-mean-token-sum-norm", {"kl_coef": 0.3}, {"loss_type": "dr_grpo", "beta": 0.3}),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_trls_grpo_trainer(case, seed):
    aggregation, our_settings, trl_settings = CASES[case]
    tokens = Tokens(seed)
    new, trl_new = tokens.new.clone().requires_grad_(), tokens.new.clone().requires_grad_()
    ours = our_loss(tokens, new, aggregation, **our_settings)
    trainer = trl_trainer(trl_new, **trl_settings)
    theirs = GRPOTrainer._compute_loss(trainer, None, tokens.trl_inputs())
    assert_same(ours.loss, new, theirs, trl_new)
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert ours.metrics["actor/entropy"] == pytest.approx(metrics["entropy"])
    if "kl" in metrics:
        assert ours.metrics["actor/kl_loss"] == pytest.approx(metrics["kl"])
    if (
        our_settings.get("objective") != "cispo"
        and "ratio_level" not in our_settings
        and "dual_clip" not in our_settings
    ):
        assert ours.metrics["actor/pg_clipfrac"] == pytest.approx(metrics["clip_ratio/region_mean"])
        assert ours.metrics["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("case", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_in_float32_they_agree_to_a_millionth(case):
    aggregation, our_settings, trl_settings = CASES[case]
    tokens = Tokens(seed=3)
    for name in ("old", "new", "reference", "advantages", "ones"):
        setattr(tokens, name, getattr(tokens, name).float())
    new, trl_new = tokens.new.clone().requires_grad_(), tokens.new.clone().requires_grad_()
    ours = our_loss(tokens, new, aggregation, **our_settings).loss
    theirs = GRPOTrainer._compute_loss(trl_trainer(trl_new, **trl_settings), None, tokens.trl_inputs())
    assert ours.dtype == torch.float32
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(new.grad, trl_new.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_corrections_are_trls_and_weigh_the_loss_as_there(mode):
    tokens = Tokens(seed=4)
    bounds = {"vllm_importance_sampling_clip_min": 0.5, "vllm_importance_sampling_clip_max": 1.5}
    vllm = {"use_vllm": True, "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": mode}
    ratio = scored(GRPOTrainer, tokens, tokens.rewards, **vllm, **bounds)["importance_sampling_ratio"]
    padded = torch.zeros(NUM_SAMPLES, MAX_TOKENS, dtype=ratio.dtype)
    padded[:, : int(tokens.mask.sum(1).max())] = ratio
    correction = correction_weights(
        tokens.packed(tokens.old),
        tokens.packed(tokens.sampling),
        tokens.ones,
        tokens.sample_index,
        correction=mode.replace("_", "-"),
        low=0.5,
        high=1.5,
    )
    torch.testing.assert_close(correction, tokens.packed(padded), rtol=1e-9, atol=1e-9)
    assert correction.min() < correction.max()

    new, trl_new = tokens.new.clone().requires_grad_(), tokens.new.clone().requires_grad_()
    ours = our_loss(tokens, new, "token-mean", correction=tokens.packed(padded)).loss
    inputs = tokens.trl_inputs(importance_sampling_ratio=padded)
    theirs = GRPOTrainer._compute_loss(trl_trainer(trl_new, loss_type="dapo", **vllm), None, inputs)
    assert_same(ours, new, theirs, trl_new)


@pytest.mark.parametrize(("theirs", "scale"), [("group", "std"), ("batch", "batch_std"), ("none", "none")])
def test_advantages_are_those_of_trls_grpo_trainer(theirs, scale):
    tokens = Tokens(seed=5)
    rewards = tokens.rewards.clone()
    rewards[5] = NAN  # a sample that no function could judge
    expected = scored(GRPOTrainer, tokens, rewards, scale_rewards=theirs)["advantages"]
    ours = group_advantages(rewards.view(NUM_GROUPS, GROUP_SIZE), epsilon=1e-4, scale=scale)
    torch.testing.assert_close(ours.flatten(), expected, rtol=1e-6, atol=1e-6)
    assert ours.abs().max() > 0


def test_leave_one_out_advantages_and_kl_in_the_reward_are_those_of_trls_rloo_trainer():
    tokens = Tokens(seed=6)
    expected = scored(RLOOTrainer, tokens, tokens.rewards, beta=0.05)["advantages"]
    kl = sample_sums(tokens.packed(tokens.old - tokens.reference), tokens.sample_index)
    sums = torch.zeros(NUM_SAMPLES, dtype=kl.dtype).index_copy(0, tokens.sample_index.long(), kl)
    rewards = (tokens.rewards - 0.05 * sums).view(NUM_GROUPS, GROUP_SIZE)
    ours = group_advantages(rewards, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(ours.flatten().double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", [7, 8])
def test_losses_and_gradients_are_those_of_trls_rloo_trainer(seed):
    tokens = Tokens(seed, spread=0.05)
    new, trl_new = tokens.new.clone().requires_grad_(), tokens.new.clone().requires_grad_()
    ours = our_loss(tokens, new, "seq-mean-token-mean", ratio_level="sequence-product").loss
    theirs = RLOOTrainer._compute_loss(trl_trainer(trl_new), None, tokens.trl_inputs())
    assert_same(ours, new, theirs, trl_new)


@pytest.mark.parametrize(("max_tokens", "buffer"), [(100, 20), (64, 64), (10, 0)])
def test_overlong_penalties_are_trls(max_tokens, buffer):
    lengths = list(range(max_tokens + 12))
    theirs = get_soft_overlong_punishment(max_tokens, buffer)([[1] * length for length in lengths])
    ours = overlong_penalty(lengths, max_tokens=max_tokens, buffer_tokens=buffer)
    torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-6, atol=1e-7)
