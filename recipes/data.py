"""Data: problems with a prompt and a right answer, split into training rows and fixed held-out rows."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUMS = "sums"
SUMS_EXAMPLES = "12 + 25 = 37\n7 + 18 = 25\n20 + 6 = 26\n"
SUMS_EXAMPLE_PAIRS = frozenset({(12, 25), (7, 18), (20, 6)})
SUMS_LARGEST_TERM = 30
NUM_HELD_OUT_SUMS = 64

# Held-out problems of a reasoning_gym task are drawn under a seed that no training set uses.
TASK_HELD_OUT_SEED = 2**31 - 1
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ANSWER_COLUMNS = ("answer", "ground_truth")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What a run trains on and what it is judged by; no prompt is in both."""

    # A row has `prompt` (text or chat messages), `answer` (text) and the data set's other columns.
    train_rows: list[Row]
    held_out_rows: list[Row]  # the same whatever the run's seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a data set hold the prompt and the answer; None stands for the usual names."""

    prompt: str = "prompt"
    answer: str | None = None


USUAL_COLUMNS = Columns()


def load_problems(
    dataset: str,
    *,
    num_held_out: int = NUM_HELD_OUT_SUMS,
    num_rows: int = 1024,
    seed: int = 0,
    split: str = "train",
    subset: str | None = None,
    columns: Columns = USUAL_COLUMNS,
) -> Problems:
    """Loads `dataset`: "sums", a .jsonl/.json/.parquet file, a reasoning_gym task or a hub id, tried in that order.

    `num_rows` and `seed` say how many problems of a reasoning_gym task are generated, and which; `split` and
    `subset` choose among a hub data set's parts. Raises ValueError where the data set can't be found or lacks a column.
    """
    if dataset == SUMS:
        return sums_problems(num_held_out)
    if is_file_name(dataset):
        return split_held_out(read_file(Path(dataset), columns), num_held_out)
    if "/" not in dataset and dataset in task_names():
        return task_problems(dataset, num_rows=num_rows, num_held_out=num_held_out, seed=seed)
    return split_held_out(read_hub_dataset(dataset, subset, split, columns), num_held_out)


# ---------------------------------------------------------------------------------------------------- sums


def sums_problems(num_held_out: int = NUM_HELD_OUT_SUMS) -> Problems:
    """Sums of two terms in 1..30 after three worked examples, in plain text.

    Neither a held-out sum nor its mirror image (b + a for a + b) is ever trained on, and the worked examples are in
    neither part. The first `num_held_out` problems of one fixed order are held out.
    """
    pairs = sorted(_sum_pairs(), key=_fixed_order)
    if not 0 <= num_held_out <= len(pairs) // 2:
        raise ValueError(f"num_held_out={num_held_out} must be 0 to {len(pairs) // 2}: there are {len(pairs)} sums")
    held_out = pairs[:num_held_out]
    seen = set(held_out) | {(b, a) for a, b in held_out}
    return Problems(
        train_rows=[sum_row(a, b) for a, b in pairs if (a, b) not in seen],
        held_out_rows=[sum_row(a, b) for a, b in held_out],
    )


def sum_row(a: int, b: int) -> Row:
    """The prompt ends in "a + b =", so that the right continuation is " c" and a newline."""
    return {"prompt": f"{SUMS_EXAMPLES}{a} + {b} =", "answer": f" {a + b}"}


def _sum_pairs() -> Iterable[tuple[int, int]]:
    terms = range(1, SUMS_LARGEST_TERM + 1)
    return ((a, b) for a in terms for b in terms if (a, b) not in SUMS_EXAMPLE_PAIRS)


def _fixed_order(item: object) -> bytes:
    """An order that looks random and is the same on every machine and Python version."""
    return hashlib.blake2b(repr(item).encode(), digest_size=16).digest()


# ---------------------------------------------------------------------------------------------------- files, hub


def is_file_name(dataset: str) -> bool:
    return Path(dataset).suffix in FILE_FORMATS


def read_file(path: Path, columns: Columns = USUAL_COLUMNS) -> list[Row]:
    """Rows of a JSONL, JSON or parquet file."""
    if not path.is_file():
        raise ValueError(f"dataset {str(path)!r}: there is no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"dataset {str(path)!r} is empty")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        table = load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        reason = error.__cause__ or error
        raise ValueError(f"dataset {str(path)!r} can't be read as {path.suffix[1:]}: {reason}") from error
    return checked_rows(table, table.column_names, columns, source=str(path))


def read_hub_dataset(dataset: str, subset: str | None, split: str, columns: Columns = USUAL_COLUMNS) -> list[Row]:
    """Rows of one split of a hub data set (or of a directory that `datasets` understands)."""
    from datasets import load_dataset

    try:
        table = load_dataset(dataset, subset, split=split)
    except Exception as error:  # the hub client has dozens of error classes; every one means that the data can't be had
        raise ValueError(_not_found_message(dataset, subset, split, error)) from error
    return checked_rows(table, table.column_names, columns, source=dataset)


def checked_rows(
    table: Iterable[Mapping[str, Any]], present: Sequence[str], columns: Columns, source: str
) -> list[Row]:
    """Rows with `prompt` and `answer` filled in from the columns that hold them; ValueError names what is missing."""
    answer_column = _answer_column(present, columns)
    missing = [] if columns.prompt in present else [f"`{columns.prompt}`"]
    missing += [] if answer_column else [f"`{columns.answer}`" if columns.answer else "`answer` (or `ground_truth`)"]
    if missing:
        raise ValueError(
            f"dataset {source!r} lacks the column{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; it has "
            f"{', '.join(f'`{name}`' for name in present) or 'none'}. Name the columns to use with --prompt-column and "
            "--answer-column"
        )
    rows = [_checked_row(row, index, columns.prompt, answer_column, source) for index, row in enumerate(table)]
    if not rows:
        raise ValueError(f"dataset {source!r} has no rows")
    return rows


def split_held_out(rows: Sequence[Row], num_held_out: int) -> Problems:
    """Holds out a fixed choice of at most a tenth of the distinct prompts, whatever order the rows come in."""
    if num_held_out < 0:
        raise ValueError(f"num_held_out={num_held_out} must not be negative")
    first_row = {repr(row["prompt"]): row for row in reversed(rows)}
    chosen = sorted(first_row, key=_fixed_order)[: min(num_held_out, len(first_row) // 10)]
    held_out = {prompt: first_row[prompt] for prompt in chosen}
    return Problems(
        train_rows=[row for row in rows if repr(row["prompt"]) not in held_out],
        held_out_rows=list(held_out.values()),
    )


def as_chat(problems: Problems, system_prompt: str | None = None) -> Problems:
    """The same problems with every text prompt as a user's message, for the model's chat template."""
    return Problems(
        train_rows=[_chat_row(row, system_prompt) for row in problems.train_rows],
        held_out_rows=[_chat_row(row, system_prompt) for row in problems.held_out_rows],
    )


def _answer_column(present: Sequence[str], columns: Columns) -> str | None:
    candidates = (columns.answer,) if columns.answer else ANSWER_COLUMNS
    return next((name for name in candidates if name in present), None)


def _checked_row(row: Mapping[str, Any], index: int, prompt_column: str, answer_column: str, source: str) -> Row:
    prompt, answer = row[prompt_column], row[answer_column]
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(
            f"dataset {source!r}, row {index}: `{prompt_column}` is {prompt!r}; it must be text or chat messages"
        )
    if answer is None:
        raise ValueError(f"dataset {source!r}, row {index}: `{answer_column}` is empty")
    return {**row, "prompt": prompt, "answer": str(answer)}


def _chat_row(row: Row, system_prompt: str | None) -> Row:
    if not isinstance(row["prompt"], str):
        return row
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return {**row, "prompt": [*system, {"role": "user", "content": row["prompt"]}]}


def _not_found_message(dataset: str, subset: str | None, split: str, error: Exception) -> str:
    what = f"{dataset!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    reason = (str(error).splitlines() or [""])[0]
    near = [] if "/" in dataset else difflib.get_close_matches(dataset, [SUMS, *task_names()], n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"dataset {what} can't be loaded ({type(error).__name__}: {reason}).{hint} A dataset is {SUMS!r}, a .jsonl or "
        ".parquet file, a task of reasoning_gym (such as chain_sum) or an id on the Hugging Face hub"
    )


# ---------------------------------------------------------------------------------------------------- reasoning_gym


def task_names() -> list[str]:
    """Names of the reasoning_gym tasks, generated offline."""
    import reasoning_gym  # noqa: F401  importing it is what fills the registry
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def task_problems(name: str, *, num_rows: int, num_held_out: int, seed: int) -> Problems:
    """Problems of a reasoning_gym task; each row's `metadata` is what the task's own scorer reads."""
    held_out = _task_rows(name, num_held_out, TASK_HELD_OUT_SEED) if num_held_out else []
    taken = {row["prompt"] for row in held_out}
    rows = [row for row in _task_rows(name, num_rows, seed) if row["prompt"] not in taken]
    if not rows:
        raise ValueError(f"task {name!r}: every one of {num_rows} generated problems is a held-out one; ask for more")
    return Problems(train_rows=rows, held_out_rows=held_out)


def _task_rows(name: str, num_rows: int, seed: int) -> list[Row]:
    from reasoning_gym import create_dataset

    entries = create_dataset(name, seed=seed, size=num_rows)
    return [
        {"prompt": entry["question"], "answer": str(entry["answer"]), "metadata": entry["metadata"], "task": name}
        for entry in entries
    ]
