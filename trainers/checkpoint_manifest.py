"""Checkpoint manifest: the list of a checkpoint's files, written last, by which a torn or changed one is known."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT_NAME = "lockstep-checkpoint"
FORMAT_VERSION = 1  # readers take this one alone; raise it with every change that an older reader would misread
MANIFEST = "MANIFEST.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or is not whole. The message says why, and the way out."""


def seal(directory: Path) -> None:
    """Brings all files below the directory to the disk, and then a manifest of them. Raises OSError."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    files = {path.relative_to(directory).as_posix(): _describe(path) for path in paths}
    write_json(directory / MANIFEST, {"format": FORMAT_NAME, "version": FORMAT_VERSION, "files": files})
    for path in [*paths, directory / MANIFEST, *{path.parent for path in paths}, directory]:
        sync(path)


def verify(directory: Path, *, reads_files: bool = True) -> None:
    """Raises CheckpointError, with the reason, unless the directory holds what its manifest says, byte for byte.

    reads_files: False compares sizes alone, which takes no time. Files that the manifest does not name are nobody's
    business.
    """
    try:
        for name, entry in _read_manifest(directory).items():
            _verify_file(directory / name, name, entry, reads_files)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error}") from error


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Brings a file, or the names in a directory, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"it has no {MANIFEST}, so it was not written to its end")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        name, version, files = manifest["format"], manifest["version"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its {MANIFEST} is damaged: {error!r}") from error
    if (name, version) != (FORMAT_NAME, FORMAT_VERSION):
        raise CheckpointError(
            f"its format is {name!r} version {version!r}, and this code reads {FORMAT_NAME!r} version "
            f"{FORMAT_VERSION} alone: use the version of the code that wrote it"
        )
    return files


def _verify_file(path: Path, name: str, entry: Any, reads_files: bool) -> None:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        raise CheckpointError(f"its {MANIFEST} is damaged: the entry of {name} is {entry!r}")
    if not path.is_file():
        raise CheckpointError(f"{name} is missing")
    size = path.stat().st_size
    if size != entry["size"]:
        raise CheckpointError(f"{name} has {size:,} bytes instead of {entry['size']:,}")
    if reads_files and _checksum(path) != entry["sha256"]:
        raise CheckpointError(f"{name} is damaged: its checksum is not the one it was written with")


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _checksum(path)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
