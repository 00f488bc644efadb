from __future__ import annotations

import html
import itertools
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.report import Report, from_files
from recipes.report.__main__ import main
from recipes.report.charts import OTHER, groups_of
from recipes.report.curves import Curves
from recipes.report.embed import as_embedded_json
from recipes.report.page import SCRIPTS, STYLE, TEMPLATE
from recipes.report.samples import MAX_SAMPLE_TOKENS, Samples
from recipes.report.summary import duration
from tests.recipes.report_runs import ENVIRONMENT, METRICS, record, step_records, write_run

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&amp;\ud83d \x00\x1b\u202e]]>🎉"


class Elements(HTMLParser):
    """The elements of a page, and the text of its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get("id") or "" if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data[self._inside] = self.data.get(self._inside, "") + data


def page_data(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Curves and steps of samples that a page holds."""
    data = Elements(path.read_text()).data
    return json.loads(data["curves-data"]), json.loads(data["samples-data"])


def tiles(path: Path) -> dict[str, str]:
    found = re.findall(r'<dt>(.*?)</dt><dd><\w+ class="value" title="(.*?)"', path.read_text())
    return {label: html.unescape(value) for label, value in found}


def test_a_page_holds_every_curve_and_every_sample_of_a_short_run(tmp_path: Path):
    curves, steps = page_data(from_files(write_run(tmp_path)))
    assert curves["curves"]["reward/mean"] == {"first": [1, 2, 3], "mean": [0.1, 0.2, 0.3], "missing": 1}
    assert curves["curves"]["eval/expected_reward"] == {"first": [0, 4], "mean": [0.25, 0.75]}
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [[len(group["samples"]) for group in step["groups"]] for step in steps] == [[2, 2]] * 4
    sample = steps[0]["groups"][1]["samples"][1]
    assert (sample["texts"], sample["ids"], sample["versions"]) == (["a", "b"], [10, 11], [[0, 2]])
    assert sample["seed"] == str(2**64 - 2), "a 64-bit seed is no number that JavaScript can hold"


def test_the_summary_says_what_the_run_came_to(tmp_path: Path):
    found = tiles(from_files(write_run(tmp_path)))
    assert found["Expected reward"] == "0.250 → 0.750"
    assert found["Reward"] == "0.100 → 0.300"
    assert found["Largest mismatch"] == "0.0"
    assert found["Steps"] == "4 of 4"
    assert found["Kernel fingerprint"] == "f00d"
    page = (tmp_path / "report.html").read_text()
    assert "over 2,000 tokens" in page
    assert "commit 0123abcd" in page
    assert "<title>tiny on sums" in page


@pytest.mark.parametrize(("worst", "shown"), [(0.25, "0.25"), (1e-7, "1e-07"), (None, "not a number")])
def test_a_mismatch_of_one_step_is_never_hidden(tmp_path: Path, worst: float | None, shown: str):
    steps = [{"step": step, "mismatch/logprob_abs_diff_max": 0.0} for step in range(3000)]
    steps[1234]["mismatch/logprob_abs_diff_max"] = worst
    page = from_files(write_run(tmp_path, steps))
    assert tiles(page)["Largest mismatch"] == shown
    assert 'class="tile bad"' in page.read_text()


def test_a_page_made_step_by_step_equals_one_made_of_the_files(tmp_path: Path):
    report = Report(write_run(tmp_path))
    for metrics in METRICS:
        step = int(metrics["step"])
        # what is null in the file was NaN in the run
        report.add(metrics | {"reward/mean": math.nan} if step == 4 else metrics, step_records(step) if step else ())
        report.write_if_due()
    live = report.write().read_bytes()
    assert from_files(tmp_path).read_bytes() == live
    assert not list(tmp_path.glob("*.partial*"))


def test_a_report_that_is_taken_up_again_has_what_went_before(tmp_path: Path):
    whole = from_files(write_run(tmp_path / "whole")).read_text()
    run = write_run(tmp_path / "run", METRICS[:3], [*step_records(1), *step_records(2)])
    report = Report.read(run)
    for step in (3, 4):
        report.add(METRICS[step], step_records(step))
    curves, steps = page_data(report.write())
    assert (curves, steps) == page_data(tmp_path / "whole" / "report.html")
    assert len(report.path.read_text()) == len(whole)
    assert not Report.read(tmp_path / "nothing").samples.steps


def test_writing_takes_a_small_part_of_a_runs_time(tmp_path: Path):
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    report = Report(write_run(tmp_path), clock)
    report.add(METRICS[0])
    report.write_if_due()  # takes a second
    first = report.path.stat().st_mtime_ns
    for _ in range(40):
        report.write_if_due()
    assert report.path.stat().st_mtime_ns == first
    for _ in range(20):
        report.write_if_due()
    assert report.path.stat().st_mtime_ns > first


@pytest.mark.parametrize("num_steps", [1, 511, 512, 513, 10_000])
def test_curves_of_a_long_run_keep_their_mean_and_extremes(num_steps: int):
    values = torch.randn(num_steps, generator=torch.Generator().manual_seed(0)).tolist()
    curves = Curves()
    for step, value in enumerate(values):
        curves.add({"step": step, "x": value, "rare": 1.0} if step % 10 == 0 else {"step": step, "x": value})
    curve = curves.get("x")
    assert len(curve.buckets) <= curves.max_buckets
    assert sum(bucket.count for bucket in curve.buckets.values()) == num_steps
    assert (curve.first, curve.last, curve.low, curve.high) == (values[0], values[-1], min(values), max(values))
    assert curve.total == pytest.approx(sum(bucket.total for bucket in curve.buckets.values()))
    spans = [(bucket.first_step, bucket.last_step) for bucket in curve.buckets.values()]
    assert [step for first, last in spans for step in range(first, last + 1)] == list(range(num_steps))


def test_samples_spread_over_a_long_run_within_their_budget():
    samples = Samples(max_tokens=400, max_samples=60)
    for step in range(1, 2001):
        samples.add(step_records(step))
        assert sum(kept.num_tokens for kept in samples.steps) <= 400
        assert samples.steps[-1].step == step
    steps = [kept.step for kept in samples.steps]
    gaps = {later - earlier for earlier, later in itertools.pairwise(steps[:-1])}
    assert steps[0] == 1
    assert gaps == {samples.stride}
    assert len(steps) > 5


def test_a_step_that_is_larger_than_its_share_is_cut_and_says_so():
    samples = Samples(max_samples=40)
    samples.add([record(1, index=index) for index in range(30)])
    (step,) = json.loads(samples.as_json())
    assert (len(step["groups"][0]["samples"]), step["left_out"]) == (10, 20)


def test_a_long_completion_is_cut_and_says_how_long_it_was():
    samples = Samples()
    samples.add([record(1, texts=["x"] * (MAX_SAMPLE_TOKENS + 5), prompt="p" * 100_000)])
    (step,) = json.loads(samples.as_json())
    sample = step["groups"][0]["samples"][0]
    assert (len(sample["ids"]), sample["num_tokens"]) == (MAX_SAMPLE_TOKENS, MAX_SAMPLE_TOKENS + 5)
    assert len(samples.as_json()) < 200_000


def test_log_probabilities_keep_every_bit_of_a_float32():
    logprobs = -torch.rand(1000, generator=torch.Generator().manual_seed(0))
    samples = Samples()
    samples.add([record(1, texts=["x"] * 1000, logprobs=logprobs.tolist())])
    (step,) = json.loads(samples.as_json())
    assert torch.equal(torch.tensor(step["groups"][0]["samples"][0]["logprobs"]), logprobs)


def test_advantages_may_differ_from_token_to_token():
    samples = Samples()
    samples.add([record(1, advantages=[0.5, -0.5])])
    (step,) = json.loads(samples.as_json())
    assert step["groups"][0]["samples"][0]["advantage"] == [0.5, -0.5]


def test_no_text_of_a_run_becomes_markup(tmp_path: Path):
    records = [record(1, texts=[HOSTILE, "b"], prompt=[{"role": HOSTILE, "content": HOSTILE}], answer=HOSTILE)]
    run = write_run(tmp_path, [{"step": 1, f"rewards/{HOSTILE}/mean": 1.0, HOSTILE: 2.0}], records)
    plain = Elements(from_files(write_run(tmp_path / "plain")).read_text())
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT | {"commit": HOSTILE, HOSTILE: [HOSTILE]}))
    elements = Elements(from_files(run).read_text())
    assert [tag for tag, _ in elements.tags].count("script") == [tag for tag, _ in plain.tags].count("script")
    assert "img" not in [tag for tag, _ in elements.tags]
    step = json.loads(elements.data["samples-data"])[0]
    assert step["groups"][0]["samples"][0]["texts"][0] == HOSTILE
    assert step["groups"][0]["prompt"] == [{"role": HOSTILE, "text": HOSTILE}]


def test_embedded_json_is_plain_text_to_html_and_the_value_to_json():
    text = as_embedded_json({"text": HOSTILE, "nan": math.nan, "tuple": (1, 2)})
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"text": HOSTILE, "nan": None, "tuple": [1, 2]}


def test_a_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path):
    page = from_files(write_run(tmp_path)).read_text()
    assert "default-src 'none'" in page
    assert not [
        tag for tag, attributes in Elements(page).tags if {"src", "action"} & attributes.keys() or tag == "link"
    ]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_every_metric_is_drawn_once_with_its_kin():
    names = ["reward/mean", "rewards/a/mean", "rewards/b/mean", "eval/pass@1", "eval/pass@8", "house/own", WHOLE_STEP]
    groups = groups_of([*names, "timing_s/rollout", "timing_s/own"])
    charts = {chart["title"]: chart["series"] for group in groups for chart in group["charts"]}
    assert [series["label"] for series in charts["Pass@k, held out"]] == ["k = 1", "k = 8"]
    assert [series["label"] for series in charts["Reward by function"]] == ["a", "b"]
    assert [series["label"] for series in charts["Time of a step"]] == ["rollout", "own"]
    assert groups[-1]["title"] == OTHER
    assert [chart["title"] for chart in groups[-1]["charts"]] == ["house/own"]
    drawn = [series["name"] for group in charts.values() for series in group]
    assert sorted(drawn) == sorted({*names, "timing_s/rollout", "timing_s/own"} - {WHOLE_STEP})


WHOLE_STEP = "timing_s/step"


def test_old_and_unfinished_files_make_a_page(tmp_path: Path):
    without_texts = [{**record(1), "token_texts": None}]
    del without_texts[0]["token_texts"]
    run = write_run(tmp_path, records=without_texts)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # a run that was killed as it wrote
    (run / "config.yaml").unlink()
    (run / "environment.json").unlink()
    curves, steps = page_data(from_files(run))
    assert curves["curves"]["eval/expected_reward"]["first"] == [0, 4]
    assert "texts" not in steps[0]["groups"][0]["samples"][0]
    assert steps[0]["groups"][0]["samples"][0]["completion"] == "ab"
    (run / "rollouts.jsonl").unlink()
    assert page_data(from_files(run))[1] == []


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(write_run(tmp_path / "run"))]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'report.html'}\n"
    assert main([str(tmp_path)]) == 2
    assert "holds no run: it has no metrics.jsonl" in capsys.readouterr().err
    for line, complaint in (("no json", "line 2 is no JSON"), ("{}", "line 2 must be an object with a `step`")):
        (tmp_path / "run" / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n')
        assert main([str(tmp_path / "run")]) == 2
        assert complaint in capsys.readouterr().err


def test_the_parts_of_the_page_are_packaged():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "recipes.report"
    ]
    parts = [path for path in (root / "recipes" / "report").iterdir() if path.is_file() and path.suffix != ".py"]
    assert {TEMPLATE, STYLE, *SCRIPTS} == {path.name for path in parts}
    assert all(any(path.match(pattern) for pattern in patterns) for path in parts)


def test_durations_read_well():
    assert [duration(seconds) for seconds in (0, 59.6, 425, 12_000)] == [
        "0 s",
        "1 min 00 s",
        "7 min 05 s",
        "3 h 20 min",
    ]
