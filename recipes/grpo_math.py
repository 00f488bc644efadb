"""GRPO on problems whose answers can be checked: `python -m recipes.grpo_math`, every option explained by --help.

Without options it trains SmolLM2-135M-Instruct on sums and raises the exact probability of a right answer on 64
held-out sums. recipes/run.py is the page to read: load, score, train, record.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .options import GRPOOptions
from .run import Recipe, run_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the process's exit code."""
    return run_recipe(RECIPE, arguments)


def classes() -> tuple[type, type]:
    """The trainer's configuration and the trainer."""
    from trainers import GRPOConfig, GRPOTrainer

    return GRPOConfig, GRPOTrainer


RECIPE = Recipe(options_class=GRPOOptions, classes=classes)


if __name__ == "__main__":
    sys.exit(main())
