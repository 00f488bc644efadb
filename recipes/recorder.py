"""Recorder: writes and shows each step of a run, and sums the run up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .display import EXPECTED_REWARD, MISMATCH, PlainDisplay
from .report import Report
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from trainers.loop import Batch

    from .trackers import Tracker

NUM_MISMATCH_TOKENS = "mismatch/num_tokens"
TokenTextsOf = Callable[[Sequence[int]], list[str] | None]  # see recipes.token_texts.TokenTexts


class Recorder:
    """Keeps the run directory, its report, the display and the tracker up to date.

    token_texts: gives the texts of a completion's tokens; without it the report shows their ids.
    """

    def __init__(
        self,
        run: RunDirectory,
        display: PlainDisplay,
        num_logged_groups: int,
        token_texts: TokenTextsOf | None = None,
        tracker: Tracker | None = None,
    ) -> None:
        self.run, self.display, self.num_logged_groups = run, display, num_logged_groups
        self.token_texts, self.tracker = token_texts, tracker
        self.progress = display.progress
        self.report = Report.read(run.path)
        for line in run.resumed:
            self.progress.add(int(line["step"]), line)

    def record(self, metrics: Mapping[str, float], batch: Batch | None, environment: Mapping[str, Any]) -> None:
        """One step; step 0 is the untrained model's and has no batch. environment: facts of engine and trainer."""
        step = int(metrics["step"])
        if not self.run.has_metrics:
            self.run.write_environment(environment)
            self.progress.first_step_started, self.progress.first_step = time.monotonic(), step
        self.run.log_metrics(metrics)
        if self.tracker is not None:
            self.tracker.log(metrics)
        self.report.add(metrics, self._record_rollouts(step, batch) if batch is not None else ())
        self.report.write_if_due()
        self.display.show_phase("rolling out and training" if step < self.progress.num_steps else "saving the weights")
        self.display.on_step(step, metrics)
        if EXPECTED_REWARD in metrics:
            self.run.draw_reward_curve(self.progress.title)

    def finish(self) -> None:
        """Brings the files up to date, however the run ended."""
        self.display.show_phase("")
        self.run.draw_reward_curve(self.progress.title)
        if self.run.has_metrics:
            self.report.write()
        if self.tracker is not None:
            self.tracker.finish()

    def summary(self) -> list[str]:
        """What the run came to, in a few lines."""
        expected, mismatch = self.progress.history.get(EXPECTED_REWARD), self.progress.history.get(MISMATCH)
        num_tokens = sum(self.progress.history.get(NUM_MISMATCH_TOKENS, []))
        lines = [f"expected reward {expected[0]:.3f} -> {expected[-1]:.3f}"] if expected else []
        if mismatch:
            lines.append(f"largest difference of log-probabilities {max(mismatch)}, over {num_tokens:,.0f} tokens")
        return [*lines, f"files in {self.progress.output_dir}; report.html there shows curves and rollouts"]

    def _record_rollouts(self, step: int, batch: Batch) -> list[dict[str, Any]]:
        """Writes and shows samples of the step; returns the records written."""
        records = rollout_records(step, batch, self.num_logged_groups, self.token_texts)
        self.run.log_rollouts(records)
        shown = (records or rollout_records(step, batch, 1))[0]
        self.display.show_sample(_text(shown["prompt"]), shown["completion"], shown["reward"])
        return records


def rollout_records(
    step: int, batch: Batch, num_groups: int, token_texts: TokenTextsOf | None = None
) -> list[dict[str, Any]]:
    """The samples of a batch's first groups, with what a reader wants to see first in front."""
    columns = (batch.rows, batch.groups, batch.rewards.total.tolist(), batch.advantages.tolist())
    return [
        {
            "step": step,
            "prompt": row["prompt"],
            "completion": rollout.text,
            "answer": row.get("answer"),
            "reward": None if math.isnan(reward) else reward,
            "advantage": advantage,
            "finish_reason": rollout.finish_reason,
            "group_id": rollout.group_id,
            "index": rollout.index,
            "seed": rollout.seed,
            "policy_versions": list(rollout.policy_versions),
            "token_ids": list(rollout.token_ids),
            "logprobs": list(rollout.logprobs),
            "token_texts": token_texts(rollout.token_ids) if token_texts else None,
        }
        for row, group, rewards, advantages in list(zip(*columns, strict=True))[:num_groups]
        for rollout, reward, advantage in zip(group, rewards, advantages, strict=True)
    ]


def _text(prompt: Any) -> str:
    """A prompt for the eye: text, or the last chat message's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) + "\n"
