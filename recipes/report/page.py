"""Page: puts a report's data, style and scripts into one HTML file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from .embed import as_embedded_json, finite

TEMPLATE, STYLE = "report.html", "report.css"
SCRIPTS = ("text.js", "charts.js", "tokens.js", "rollouts.js", "main.js")  # one script element, in this order


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    tiles: Sequence[Mapping[str, Any]]  # see summary.tiles
    tables: Mapping[str, Mapping[str, Any]]  # title -> name -> value
    charts: Sequence[Mapping[str, Any]]  # see charts.groups_of
    curves: Mapping[str, Mapping[str, Any]]  # metric -> see Curve.as_json
    stride: int  # steps that a point of a curve sums up
    samples_json: str  # see Samples.as_json


def render(page: Page) -> str:
    """The page's HTML. Texts of the run are data for its script, or escaped; none can become markup."""
    style, script = _asset(STYLE), _script()
    data = {"charts": page.charts, "curves": page.curves, "stride": page.stride}
    return Template(_asset(TEMPLATE)).substitute(
        title=html.escape(printable(page.title)),
        tiles="\n".join(_tile(tile) for tile in page.tiles),
        tables="\n".join(_table(title, values) for title, values in page.tables.items() if values),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}",
        style=style,
        script=script,
        data=as_embedded_json(data),
        samples=page.samples_json,
    )


def printable(text: str) -> str:
    """The text with what UTF-8 or HTML cannot hold (lone surrogates, control characters) written as escapes."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def _tile(tile: Mapping[str, Any]) -> str:
    value, note = _escaped(tile["value"]), _escaped(tile["note"])
    tag = "code" if tile.get("is_code") else "span"
    return (
        f'<div class="tile {_escaped(tile.get("state", ""))}"><dt>{_escaped(tile["label"])}</dt>'
        f'<dd><{tag} class="value" title="{value}">{value}</{tag}>'
        f'<span class="note" title="{note}">{note}</span></dd></div>'
    )


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{_escaped(name)}</th><td>{_escaped(value)}</td></tr>' for name, value in _flat(values)
    )
    return f"<details><summary>{_escaped(title)}</summary><table>{rows}</table></details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as rows "outer.inner"."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _escaped(value: Any) -> str:
    if value is None:
        return "–"
    return html.escape(printable(" ".join(map(str, value)) if isinstance(value, list | tuple) else str(finite(value))))


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    parts = "\n".join(_asset(name) for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _hash(text: str) -> str:
    """A source of a Content-Security-Policy: this very text, and no other inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
