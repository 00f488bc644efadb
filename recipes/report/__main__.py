"""Makes a run's report again from its files: `python -m recipes.report RUN_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from ..exits import exit_code, user_errors
from .report import from_files


def main(arguments: list[str] | None = None) -> int:
    """Makes the page of the run that the command line names; returns the process's exit code."""
    return exit_code(lambda: tyro.cli(write_report, prog="python -m recipes.report", args=arguments))


def write_report(run_dir: Annotated[Path, tyro.conf.Positional]) -> None:
    """Makes RUN_DIR/report.html again from metrics.jsonl, rollouts.jsonl, config.yaml and environment.json.

    Args:
        run_dir: The directory of a run, which may still be going.
    """
    with user_errors():
        print(from_files(run_dir))


if __name__ == "__main__":
    sys.exit(main())
