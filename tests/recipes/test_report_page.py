"""The report as a reader meets it: in a real Chromium, which these tests look for and are skipped without."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes.report import from_files
from tests.recipes.report_runs import METRICS, record, step_records, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
Open = Callable[..., Any]

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'><!--&lt;\ud83d\x00\x1b[31m\u202e🎉"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, BROWSERS)), driver.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no Chromium or Chrome here (Debian: apt-get install chromium)")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a page; at the end of the test it must have asked for nothing but itself, and complained of nothing."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.partition("#")[0]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.endswith("/report.html")} == set()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return from_files(write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two thousand steps, summed up in buckets."""
    metrics = [{"step": step, "reward/mean": step % 7 / 7, "timing_s/rollout": 1 + step % 3} for step in range(2000)]
    metrics[1777]["timing_s/eval"] = 9.0
    return from_files(write_run(tmp_path_factory.mktemp("long"), metrics))


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unbroken = "x" * 3000
    records = [
        record(
            1, texts=[HOSTILE, "", "🎉", "\n", "\t", unbroken], prompt=HOSTILE + unbroken, answer=HOSTILE, reward=None
        ),
        record(1, index=1, prompt=[{"role": HOSTILE, "content": HOSTILE}], group_id=HOSTILE, finish_reason=HOSTILE),
    ]
    metrics = [{"step": step, HOSTILE: 1.0, f"rewards/{unbroken}/mean": 0.5, "m" * 300: 1.0} for step in range(1, 3)]
    return from_files(write_run(tmp_path_factory.mktemp("hostile"), metrics, records))


def points_drawn(page: Any) -> dict[str, int]:
    paths = page.eval_on_selector_all("path[data-name]", "all => all.map(p => [p.dataset.name, p.getAttribute('d')])")
    return {name: len(re.findall("[ML]" if "Z" not in d else "Z", d)) for name, d in paths}


def curve_data(page: Any) -> dict[str, Any]:
    return json.loads(page.text_content("#curves-data"))["curves"]


@pytest.mark.parametrize("kind", ["report", "long_report"])
def test_every_curve_has_as_many_points_as_its_data(open_page: Open, request: pytest.FixtureRequest, kind: str):
    page = open_page(request.getfixturevalue(kind))
    curves = curve_data(page)
    expected = {name: len(curve["mean"]) for name, curve in curves.items() if name != "timing_s/step"}
    assert points_drawn(page) == expected
    assert max(expected.values()) <= 512


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("kind", ["report", "long_report", "hostile_report"])
def test_nothing_is_wider_than_the_window(open_page: Open, request: pytest.FixtureRequest, kind: str, width: int):
    page = open_page(request.getfixturevalue(kind), width)
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_text_is_shown_as_text(open_page: Open, hostile_report: Path):
    page = open_page(hostile_report)
    shown = page.text_content(".tokens")
    for part in (
        "</script><script>window.hit=1</script>",
        "<img src=x",
        "&lt;",
        "U+D83D",
        "U+0000",
        "U+001B",
        "U+202E",
        "◌",
        "↵",
        "⇥",
    ):
        assert part in shown
    assert page.text_content("#sample pre").startswith("</script>")
    page.click("#samples li >> nth=1")
    assert "</script>" in page.text_content("#sample .role")
    assert page.evaluate("window.hit") is None
    assert page.locator("img, iframe, object").count() == 0


def test_a_chart_is_read_by_pointer(open_page: Open, report: Path):
    page = open_page(report)
    chart = page.locator(".chart", has=page.locator("h4", has_text=re.compile("^Reward$")))
    assert chart.locator(".figure").all_text_contents() == ["0.3", "0.75"]
    chart.locator(".plot").scroll_into_view_if_needed()
    box = chart.locator(".plot").bounding_box()
    left, right = box["x"] + 48, box["x"] + box["width"] - 10  # charts.js: MARGIN
    page.mouse.move(left + (right - left) * 2 / 4, box["y"] + 60)
    assert page.text_content("#cursor") == "Step 2"
    assert chart.locator(".figure").all_text_contents() == ["0.2", "0.25 at step 0"]
    assert page.locator(".cursor path").count() == page.locator(".chart").count(), "one cursor for all charts"
    page.mouse.move(5, 5)
    assert chart.locator(".figure").all_text_contents() == ["0.3", "0.75"]


def test_a_chart_is_read_by_keyboard(open_page: Open, report: Path):
    page = open_page(report)
    page.locator(".plot").first.focus()
    for key, words in (("Home", "Step 0"), ("ArrowRight", "Step 1"), ("End", "Step 4"), ("ArrowLeft", "Step 3")):
        page.keyboard.press(key)
        assert page.text_content("#cursor") == words
        said = page.locator(".plot").first.get_attribute("aria-valuetext")
        assert said.startswith(f"{words}: mean of the step's samples")
    page.keyboard.press("Escape")
    assert page.text_content("#cursor") == ""


def test_dragging_over_a_chart_zooms_all_of_them(open_page: Open, long_report: Path):
    page = open_page(long_report)
    before = points_drawn(page)
    page.locator(".plot").first.scroll_into_view_if_needed()
    box = page.locator(".plot").first.bounding_box()
    page.mouse.move(box["x"] + 150, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 50)
    page.mouse.up()
    low, high = (int(page.input_value(f"#{name}")) for name in ("from-step", "to-step"))
    assert 0 < low < high < 1999
    assert 0 < points_drawn(page)["reward/mean"] < before["reward/mean"]
    page.click("#all-steps")
    assert points_drawn(page) == before
    page.fill("#from-step", "1000")
    page.keyboard.press("Tab")
    assert points_drawn(page)["reward/mean"] < before["reward/mean"]


def test_a_phase_that_few_steps_have_is_drawn_at_its_share(open_page: Open, long_report: Path):
    page = open_page(long_report)
    chart = page.locator(".chart", has=page.locator("h4", has_text="Time of a step"))
    (figure,) = chart.locator(".figure").all_text_contents()[1:]
    assert float(figure) == pytest.approx(9 / 4, rel=1e-3), "2,000 steps are drawn four to a bar"


def test_samples_are_found_by_step_group_and_reward(open_page: Open, report: Path):
    page = open_page(report)
    assert page.input_value("#step") == "4", "the latest step comes first"
    assert page.locator("#samples li").count() == 4
    page.select_option("#group", "step4-prompt1")
    assert page.locator("#samples .name").all_text_contents() == ["step4-prompt1 #0", "step4-prompt1 #1"]
    page.select_option("#sort", "highest reward")
    assert page.locator("#samples .reward").all_text_contents() == ["1", "0"]
    page.fill("#to-reward", "0.5")
    assert page.locator("#samples .reward").all_text_contents() == ["0"]
    page.fill("#from-reward", "0.4")
    assert "No sample is like that" in page.text_content("#sample")
    page.fill("#from-reward", "")
    page.fill("#to-reward", "")
    page.select_option("#group", "")
    page.select_option("#step", "all")
    assert page.text_content("#num-shown") == "16 samples"


def test_samples_and_tokens_are_read_by_keyboard(open_page: Open, report: Path):
    page = open_page(report)
    page.focus("#samples")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#samples [aria-selected=true]", "id") == "sample-1"
    assert page.text_content("#sample h3") == "Step 4 · step4-prompt0 · sample 1"
    page.keyboard.press("[")
    assert page.text_content("#sample h3").startswith("Step 3")
    page.keyboard.press("]")
    page.keyboard.press("c")
    assert page.locator("input[name=colouring]:checked").get_attribute("value") == "version"
    assert page.locator(".token .version").all_text_contents()[0] == "v3"
    page.focus(".tokens")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    words = page.locator(".readout > span").all_text_contents()
    assert words == [
        "token 2 of 2",
        "b",
        "id 11",
        "log-probability −0.125",
        "p = 0.8825",
        "version 3",
        "advantage −0.5",
    ]


def test_a_sample_shows_what_became_of_it(open_page: Open, report: Path):
    page = open_page(report)
    page.click("#samples li >> nth=1")
    facts = page.text_content("#sample .facts")
    for words in ("Reward1", "Advantage+0.5", "Finishstop", "Tokens2", "Version3", f"Seed{2**64 - 2}"):
        assert words in facts
    assert page.locator("#sample pre").all_text_contents() == ["1 + 1 =", "2"]
    page.hover(".token >> nth=0")
    assert "id 10" in page.text_content(".readout")


def test_colours_come_with_a_second_sign(open_page: Open, tmp_path: Path):
    logprobs, advantages = [-0.01, -0.5, -6.0], [1.0, -1.0, 0.0]
    sample = record(1, texts=["a", "b", "c"], logprobs=logprobs, advantages=advantages, policy_versions=[0, 0, 1])
    page = open_page(from_files(write_run(tmp_path, METRICS[:2], [sample])))

    def style(name: str) -> list[str]:
        return page.eval_on_selector_all(".tokens .token", f"all => all.map(token => getComputedStyle(token).{name})")

    assert len(set(style("boxShadow"))) == 3, "the less likely, the thicker the line below"
    page.check("input[value=advantage]", force=True)
    assert style("borderBottomStyle") == ["solid", "dotted", "none"]
    page.check("input[value=version]", force=True)
    assert page.locator(".tokens .version").all_text_contents() == ["v0", "v1"]


def test_a_reload_comes_back_to_what_was_chosen(open_page: Open, report: Path):
    page = open_page(report)
    page.select_option("#step", "2")
    page.click("#samples li >> nth=3")
    page.check("input[value=advantage]", force=True)
    page.reload()
    assert page.text_content("#sample h3") == "Step 2 · step2-prompt1 · sample 1"
    assert page.locator("input[name=colouring]:checked").get_attribute("value") == "advantage"


def test_a_run_without_token_texts_or_rollouts_has_a_page(open_page: Open, tmp_path: Path):
    records = [item | {"token_texts": None} for item in step_records(1)]
    page = open_page(from_files(write_run(tmp_path / "ids", records=records)))
    assert page.text_content(".tokens") == "1011"
    assert "ab" in page.locator("#sample pre").all_text_contents()
    page = open_page(from_files(write_run(tmp_path / "none", [{"step": 0}], [])))
    assert "keeps no rollouts" in page.text_content("#rollouts")
    assert "No step has been measured yet" in page.text_content("#charts")


def test_every_control_has_a_name(open_page: Open, report: Path):
    page = open_page(report)
    controls = page.locator("input:visible, select, button, [tabindex='0']")
    for place in range(controls.count()):
        control = controls.nth(place)
        name = control.evaluate("c => c.ariaLabel || c.labels?.[0]?.textContent || c.textContent")
        assert name.strip(), control.evaluate("c => c.outerHTML")


CONTRASTS = """() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+(e-\\d+)?/g).map(Number);
    return (text.startsWith('color') ? [r, g, b] : [r / 255, g / 255, b / 255]).concat(a);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, i) => c * a + below[i] * (1 - a)).concat(1);
  const own = (node) => parse(getComputedStyle(node).backgroundColor);
  const background = (node) => node ? over(own(node), background(node.parentElement)) : [1, 1, 1, 1];
  const light = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('script, noscript, .skip')) continue;
    const below = background(node);
    const style = getComputedStyle(node);
    const colour = over(parse(node.closest('svg') ? style.fill : style.color), below);
    const [low, high] = [luminance(colour), luminance(below)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data.trim().slice(0, 40), node.className?.toString()]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(open_page: Open, tmp_path: Path, scheme: str):
    logprobs = [-0.01, -0.5, -1.2, -2.5, -4.0, -9.0]
    sample = record(1, texts=list("abc\nef"), logprobs=logprobs, advantages=[1, -1, 0.5, -0.5, 0.1, -0.1])
    sample["policy_versions"] = [0, 1, 2, 3, 4, 5]
    page = open_page(from_files(write_run(tmp_path, METRICS, [sample])), color_scheme=scheme)
    for colouring in ("logprob", "version", "advantage", "none"):
        page.check(f"input[value={colouring}]", force=True)
        faint = [text for text in page.evaluate(CONTRASTS) if text[0] < 4.5]
        assert faint == []
