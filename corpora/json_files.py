"""Reads the JSON files of data sets, in which any field may be missing or of another type."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from corpora.records import CorpusError, Exclusion, Report

_T = TypeVar("_T")


def read_json(path: str | Path) -> Any:
    """The content of a UTF-8 JSON file. Raises CorpusError: missing, or where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: no such file") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # invalid JSON, or not UTF-8
        raise CorpusError(f"{path}: not a JSON file ({error})") from error


def lists(path: str | Path, content: Any, kind: str, *names: str) -> list[list[Any]]:
    """The lists that a file of this kind must have. Raises CorpusError naming the missing one."""
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise CorpusError(f"{path}: not a {kind} file: it has no list {name!r}")
    return [content[name] for name in names]


def text(value: Any) -> str | None:
    """A string with its white space collapsed; None for an empty one or another type."""
    return " ".join(value.split()) or None if isinstance(value, str) else None


def identifier(value: Any) -> str | None:
    """An id, written as a number or as a string; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    return str(value).strip() or None


def picture_id(value: Any) -> str | None:
    """The id of a picture: an identifier, of which a number's leading zeros do not count."""
    id_ = identifier(value)
    return str(int(id_)) if id_ is not None and id_.isdecimal() else id_


def whole_number(value: Any) -> int | None:
    """An integer, written as a number or as a string of digits; None for anything else."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def finished(
    path: str | Path, kept: list[_T], excluded: Sequence[Exclusion]
) -> tuple[list[_T], Report]:
    """The records and their report. Raises CorpusError when nothing was kept."""
    report = Report(str(path), len(kept), tuple(excluded))
    if not kept:
        first = f". First: {excluded[0]}" if excluded else ""
        raise CorpusError(f"nothing to keep in {report}{first}")
    return kept, report
