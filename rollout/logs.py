"""Logs: a JSON object a line on the standard error of every process of the service, which Ray keeps in its log folder.

Ray can do the like for a whole job (`ray.init(logging_config=)`), but then configures the caller's own process too, and
cannot be told once Ray runs, which a pool often finds. So this is the standard library's `logging`, for our packages.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

PACKAGES = ("kernels", "engine", "rollout", "trainers")
LEVEL_OPTION, FORMAT_OPTION = "LOCKSTEP_LOG_LEVEL", "LOCKSTEP_LOG_FORMAT"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("json", "text")
NAMED_GROUPS = 4  # of those that an event concerns

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(**context: str | int) -> None:
    """Lets this process, one of the service's own, write its log. context: fields that every line has.

    Raises ValueError for a level or format that there is not.
    """
    options = _options()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if options[FORMAT_OPTION] == "json" else TextFormatter())
    handler.addFilter(_Context(context))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False  # else Ray's worker would print it once more
        logger.setLevel(options[LEVEL_OPTION])


def worker_env() -> dict[str, str]:
    """This process's options, for the processes that it starts. Raises ValueError as `configure` does."""
    return {name: value for name, value in _options().items() if name in os.environ}


def some_of(group_ids: list[str]) -> dict[str, object]:
    """Fields for an event that concerns these groups: how many, and the first few."""
    return {"num_groups": len(group_ids), "group_ids": group_ids[:NAMED_GROUPS]}


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message, then the fields of process and event, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for eyes: the fields follow the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        return f"{super().format(record)} [{fields}]"


class _Context(logging.Filter):
    """Gives every record the process's fields, where the event has not set them itself."""

    def __init__(self, context: dict[str, str | int]) -> None:
        super().__init__()
        self._context = context

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in self._context.items():
            vars(record).setdefault(name, value)
        return True


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _options() -> dict[str, str]:
    level = os.environ.get(LEVEL_OPTION, "INFO").upper()
    style = os.environ.get(FORMAT_OPTION, "json").lower()
    for name, value, known in ((LEVEL_OPTION, level, LEVELS), (FORMAT_OPTION, style, FORMATS)):
        if value not in known:
            raise ValueError(f"{name}={os.environ[name]} must be one of {', '.join(known)}")
    return {LEVEL_OPTION: level, FORMAT_OPTION: style}
