"""PPO on problems whose answers can be checked: `python -m recipes.ppo_math`, every option explained by --help.

Without options it trains SmolLM2-135M-Instruct on sums as `recipes.grpo_math` does, with a critic in place of the
groups' means. recipes/run.py is the page to read: load, score, train, record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .ppo_options import PPOOptions
from .run import Recipe, run_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the process's exit code."""
    return run_recipe(RECIPE, arguments)


def classes() -> tuple[type, type]:
    """The trainer's configuration and the trainer."""
    from trainers import PPOConfig, PPOTrainer

    return PPOConfig, PPOTrainer


RECIPE = Recipe(options_class=PPOOptions, classes=classes)


if __name__ == "__main__":
    sys.exit(main())
