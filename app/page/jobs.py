"""What a job sent to the page may say and which files it may name.

Gradio copies whatever file or address a job names into its folder and serves it from there. Its own
check of that waits for `Blocks.launch`, which a mounted page never calls. So a job is read here
first, and what Gradio gets is written anew from what was found good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_FILE_KEYS = {"path", "url", "meta"}
"""By these Gradio tells files from other objects; everything that has one must be a file."""
_MAX_DEPTH = 16


class JobError(ValueError):
    """A job that is not run: what is wrong with it."""


class _Meta(BaseModel):
    type: Literal["gradio.FileData"] = Field(alias="_type")


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    path: str
    url: str | None = None
    orig_name: str | None = None
    size: int | None = None
    mime_type: str | None = None
    is_stream: Literal[False] = False
    meta: _Meta


class _Job(BaseModel):
    model_config = ConfigDict(strict=True)

    data: list[Any]
    fn_index: int
    session_hash: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    trigger_id: int | None = None
    event_data: Any = None


class Jobs:
    """The jobs of a page: which there are, and which pictures it shows as examples."""

    def __init__(self, blocks: gr.Blocks) -> None:
        config = blocks.get_config_file()
        sizes = {
            one["id"]: len(one["props"]["samples"])
            for one in config["components"]
            if one["type"] == "dataset"
        }
        self._inputs = {
            one["id"]: [sizes.get(component) for component in one["inputs"]]
            for one in config["dependencies"]
            if one["backend_fn"]
        }
        self._examples = set(_paths(config["components"]))

    def checked(
        self, body: bytes, uploaded: Callable[[str], bool], kept: Callable[[str], bool]
    ) -> bytes:
        """The job in `body`, with nothing in it that was not looked at.

        Its values may name the visitor's uploads (`uploaded`) and the examples of the page, its
        event also what the page has shown (`kept`: files that the server has stored); each must be
        `kept` still. JobError otherwise.
        """
        try:
            job = _Job.model_validate(json.loads(body, parse_constant=_refuse_constant))
        except ValidationError as error:
            raise JobError(_told(error)) from error
        except (ValueError, RecursionError) as error:
            raise JobError(f"the job is not JSON: {error}") from error
        expected = self._inputs.get(job.fn_index)
        if expected is None:
            raise JobError(f"fn_index: the page has no job {job.fn_index}")
        if len(job.data) != len(expected):
            raise JobError(f"data: {len(job.data)} values where there are {len(expected)}")
        for value, size in zip(job.data, expected, strict=True):
            if size is not None and (type(value) is not int or not 0 <= value < size):
                raise JobError(f"data: the page has no example {value!r}")

        def own(path: str) -> bool:
            return (uploaded(path) or path in self._examples) and kept(path)

        job.data = [_rewritten(value, own) for value in job.data]
        job.event_data = _rewritten(job.event_data, kept)
        return json.dumps(dict(job)).encode()


def _rewritten(value: Any, may_name: Callable[[str], bool], depth: int = 0) -> Any:
    """The value, with its files reduced to what the server said about them."""
    if depth > _MAX_DEPTH:
        raise JobError(f"a value is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_rewritten(one, may_name, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if not _FILE_KEYS & value.keys():
        return {key: _rewritten(one, may_name, depth + 1) for key, one in value.items()}
    try:
        file = _File.model_validate(value)
    except ValidationError as error:
        raise JobError(f"a file is malformed: {_told(error)}") from error
    name = Path(file.path).name[:80]
    if not may_name(file.path):
        raise JobError(f"{name!r} was not uploaded here or is kept no longer: upload it again")
    if file.url is not None and not unquote(file.url).endswith(f"/file={file.path}"):
        raise JobError(f"the url of {name!r} is not the one that it has here")
    return file.model_dump(by_alias=True, exclude={"url"})


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(step) for step in first["loc"]) or "the job"
    return f"{place}: {first['msg']}"


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(path := value.get("path"), str):
            yield path
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _paths(one)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
