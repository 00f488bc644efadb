"""GRPO's trainer actor: trains the policy on samples whose advantages are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rollout import Rollout
from trainers.trainer_actor import OwnProcess, TrainerActor, num_compared, of_version


class GRPOActor(TrainerActor):
    """A TrainerActor whose batches are learned from as a whole, num_iterations times."""

    def step(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], checked: Sequence[Rollout] = ()
    ) -> dict[str, float]:
        """Train on rollouts; `checked` ones only have their log-probabilities compared.

        advantages: one per rollout; each rank is given the whole batch. The mismatch is that of every token of both
        that has a loss_mask of 1 (others the engine may not have drawn): of the training forward itself, before the
        optimiser moves, for tokens of the current version; for those of an older one, of a forward under its weights.
        Without a token to train on the optimiser rests, and the rest is counted.
        """
        self._require_lockstep([*rollouts, *checked])
        measured = self._compare_stale([*rollouts, *checked])
        num_stale_tokens = num_compared(measured)
        measured += self._compare_fresh(checked)
        version, metrics = self.policy.policy_version, {}
        batches = self._pack(rollouts, advantages)
        num_tokens, num_iterations = self._count_tokens(batches), self.config.num_iterations
        if num_tokens:
            self.history.keep(version, self.policy.named_weights())
            targets, target_metrics = self._targets(batches, rollouts, self._reference_logprobs(batches))
            for iteration in range(num_iterations):
                is_last = iteration == num_iterations - 1
                logprobs, metrics = self._update(batches, targets, len(rollouts), is_last)
                if iteration == 0:
                    measured += map(partial(of_version, version), logprobs, batches)
            metrics |= target_metrics
        else:
            self.num_skipped_steps += 1
        return {
            **metrics,
            **self._compared_metrics(measured, num_stale_tokens),
            "actor/num_skipped_steps": self.num_skipped_steps,
            "actor/num_tokens": num_tokens,
            "actor/num_rows": self._count_rows(batches) * num_iterations,
            "policy_version": self.policy.policy_version,
        }


class RemoteGRPOActor(OwnProcess, GRPOActor):
    """What a Ray actor runs."""
