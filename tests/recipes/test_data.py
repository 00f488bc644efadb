from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.data import (
    NUM_HELD_OUT_SUMS,
    SUMS_EXAMPLES,
    Columns,
    as_chat,
    load_problems,
    split_held_out,
    sum_row,
    sums_problems,
    task_names,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def terms(row: dict[str, Any]) -> tuple[int, int]:
    a, _, b, _ = row["prompt"].removeprefix(SUMS_EXAMPLES).split()
    return int(a), int(b)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_sum_row_is_plain_text_after_three_worked_examples():
    assert sum_row(5, 3) == {
        "prompt": "12 + 25 = 37\n7 + 18 = 25\n20 + 6 = 26\n5 + 3 =",
        "answer": " 8",
    }


def test_sums_are_right_and_within_range():
    problems = sums_problems()
    rows = problems.train_rows + problems.held_out_rows
    assert all(int(row["answer"]) == sum(terms(row)) for row in rows)
    assert {term for row in rows for term in terms(row)} == set(range(1, 31))


def test_held_out_sums_and_their_mirror_images_are_never_trained_on():
    problems = load_problems("sums")
    held_out = {terms(row) for row in problems.held_out_rows}
    trained = {terms(row) for row in problems.train_rows}
    assert len(problems.held_out_rows) == len(held_out) == NUM_HELD_OUT_SUMS == 64
    assert not trained & (held_out | {(b, a) for a, b in held_out})
    assert len(trained) > 700


def test_held_out_sums_do_not_depend_on_the_seed_and_stay_the_same_for_ever():
    rows = [load_problems("sums", seed=seed).held_out_rows for seed in (0, 1)]
    assert rows[0] == rows[1]
    assert [terms(row) for row in rows[0][:4]] == [(30, 1), (28, 7), (27, 22), (1, 18)]


def test_worked_examples_are_in_neither_part():
    problems = sums_problems()
    assert not {(12, 25), (7, 18), (20, 6)} & {terms(row) for row in problems.train_rows + problems.held_out_rows}


def test_too_many_held_out_sums_are_refused():
    with pytest.raises(ValueError, match="num_held_out=900 must be 0 to 448"):
        sums_problems(900)


def test_jsonl_rows_keep_their_columns_and_get_an_answer(tmp_path: Path):
    rows = [{"prompt": f"p{i}", "ground_truth": i, "level": "easy"} for i in range(30)]
    problems = load_problems(write_lines(tmp_path / "data.jsonl", rows))
    assert len(problems.held_out_rows) == 3
    assert len(problems.train_rows) == 27
    row = next(row for row in problems.train_rows if row["prompt"] == "p7" or row["prompt"] == "p8")
    assert row["answer"] == row["prompt"][1:]
    assert row["level"] == "easy"


def test_parquet_rows_are_read(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["1 + 1 =", "2 + 2 ="], "answer": ["2", "4"]})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    problems = load_problems(str(tmp_path / "data.parquet"))
    assert [row["answer"] for row in problems.train_rows] == ["2", "4"]
    assert problems.held_out_rows == []


def test_columns_can_be_named(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [{"question": "1 + 1 =", "result": 2}])
    problems = load_problems(path, columns=Columns(prompt="question", answer="result"))
    assert problems.train_rows == [{"question": "1 + 1 =", "result": 2, "prompt": "1 + 1 =", "answer": "2"}]


def test_chat_messages_are_read(tmp_path: Path):
    prompt = [{"role": "user", "content": "1 + 1?"}]
    problems = load_problems(write_lines(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": "2"}]))
    assert problems.train_rows[0]["prompt"] == prompt


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"question": "q", "answer": "a"}], Columns(), r"lacks the column `prompt`; it has `question`, `answer`"),
        (
            [{"prompt": "q", "result": "a"}],
            Columns(),
            r"lacks the column `answer` \(or `ground_truth`\); it has `prompt`",
        ),
        ([{"x": "q"}], Columns(), r"lacks the columns `prompt` and `answer` \(or `ground_truth`\); it has `x`"),
        (
            [{"prompt": "q", "answer": "a"}],
            Columns(answer="gold"),
            r"lacks the column `gold`; it has `prompt`, `answer`",
        ),
        ([{"prompt": "", "answer": "a"}], Columns(), "row 0: `prompt` is ''; it must be text or chat messages"),
        ([{"prompt": "q", "answer": "a"}, {"prompt": "q", "answer": None}], Columns(), "row 1: `answer` is empty"),
    ],
)
def test_what_a_data_set_lacks_is_named(tmp_path: Path, rows: list[dict], columns: Columns, message: str):
    path = write_lines(tmp_path / "data.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_problems(path, columns=columns)


def test_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file"):
        load_problems(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_problems(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="can't be read as jsonl"):
        load_problems(str(tmp_path / "broken.jsonl"))


def test_an_unknown_name_is_answered_with_near_ones(monkeypatch: pytest.MonkeyPatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'chain_sums'.*can't be loaded.*Did you mean chain_sum"):
        load_problems("chain_sums")


def test_held_out_rows_do_not_depend_on_the_order_of_rows_and_take_duplicates_along():
    rows = [{"prompt": f"p{i % 50}", "answer": str(i)} for i in range(100)]
    problems = split_held_out(rows, 5)
    turned = split_held_out(rows[::-1], 5)
    held_out = {row["prompt"] for row in problems.held_out_rows}
    assert len(held_out) == 5
    assert held_out == {row["prompt"] for row in turned.held_out_rows}
    assert not held_out & {row["prompt"] for row in problems.train_rows}
    assert len(problems.train_rows) == 90


def test_tasks_of_reasoning_gym_are_generated_by_seed_with_fixed_held_out_rows():
    first, again, other = (load_problems("chain_sum", num_rows=20, num_held_out=8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train_rows != other.train_rows
    assert first.held_out_rows == other.held_out_rows
    assert len(first.held_out_rows) == 8
    assert {"prompt", "answer", "metadata", "task"} == set(first.train_rows[0])
    assert len(task_names()) > 100


def test_chat_turns_text_prompts_into_messages():
    problems = as_chat(sums_problems(), "Be brief.")
    prompt = problems.held_out_rows[0]["prompt"]
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert prompt[1]["content"] == sums_problems().held_out_rows[0]["prompt"]
    assert as_chat(problems) == problems
