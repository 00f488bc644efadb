"""Embed: JSON that may stand inside a script element, whatever texts it holds."""

from __future__ import annotations

import json
import math
from typing import Any

# `</script>`, `<!--` and `]]>` end or change how a script element is read; written like this they are plain text to it.
_ESCAPES = str.maketrans({"<": r"\u003c", ">": r"\u003e", "&": r"\u0026"})


def as_embedded_json(value: Any) -> str:
    """ASCII JSON without `<`, `>` and `&`; lone surrogates and control characters are escaped, NaN becomes null."""
    return json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def finite(value: Any) -> Any:
    """The value with null in the place of every float that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
