"""Which code decides a stage's numbers, as one fingerprint that comments cannot change.

The modules that a stage's own module imports, and what those import, decide its numbers, unless
they are named in DOES_NOT_DECIDE: a new module counts until somebody says that it does not. Of each
module counts its syntax tree without docstrings, messages of exceptions and descriptions of keys;
and the YAML file or HTML template of the same name beside it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from workfolder.entries import WorkFolder, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]

DOES_NOT_DECIDE = (
    # Where and how work runs, what is shown of it, how it is found again.
    "gill_errors", "gill_files", "gill_progress", "gill_records", "workfolder", "cluster", "doctor",
    "app",
    "cache.copying", "cache.exporting", "cache.inspecting", "cache.joining", "cache.location",
    "cache.lock", "cache.manifest", "cache.memory", "cache.sharing", "cache.verifying",
    "gill.artifacts", "gill.diffusers_pipeline", "gill.dimensions", "gill.frozen", "gill.hub",
    "gill.model_card", "gill.world",
    "pipeline.devices", "pipeline.frozen.provenance", "pipeline.training.loggers",
    "pipeline.training.progress", "stages.validation_pictures",
    "stages.init", "stages.stores",
    # Weights that exist are read exactly, or not at all.
    "stages.trained_weights",
    # Values of params are in the key themselves.
    "settings", "cache.settings", "corpora.caption_params", "pipeline.settings",
)  # fmt: skip
"""Modules, or whole rooms, that do not decide a number of any stage."""


def code_fingerprint(module: str, work: WorkFolder | None = None) -> str:
    """Of a module and everything of this project that it imports; 16 hex digits.

    With a work folder: of the code that this one was said to equal (`accept_code`).
    """
    total = hashlib.sha256()
    for name in deciding_modules(module):
        total.update(f"{name} {_module_fingerprint(name)}\n".encode())
    found = total.hexdigest()[:16]
    return found if work is None else _accepted(work).get(found, found)


def accept_code(work: WorkFolder, ours: str, earlier: str) -> None:
    """Say that code of fingerprint `ours` computes the same numbers as code of `earlier`."""
    accepted = _accepted(work)
    write_json(work.root / "accepted.json", {**accepted, ours: accepted.get(earlier, earlier)})


def deciding_modules(module: str) -> list[str]:
    """Names of the modules behind `code_fingerprint`, sorted."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        # A module that does not decide hides what it alone imports, too.
        if name in found or any(name == n or name.startswith(f"{n}.") for n in DOES_NOT_DECIDE):
            continue
        found.add(name)
        waiting += imported_modules(name)
    return sorted(found)


@functools.cache
def imported_modules(name: str) -> tuple[str, ...]:
    """Modules of this project that a module imports anywhere in it, but for type hints alone.

    What a package hands on from one of its modules counts as imported from that module.
    """
    found = []
    for node in _runtime_nodes(_tree(name)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _file(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module and _file(node.module):
            found += [_defining_module(node.module, alias.name) for alias in node.names]
    return tuple(dict.fromkeys(found))


def _defining_module(package: str, name: str) -> str:
    """The module that `from package import name` comes from."""
    if _file(f"{package}.{name}"):
        return f"{package}.{name}"
    # The package hands the name on: its own __init__ or stub says from which module.
    for node in _names_of(package):
        module = f"{package}.{node.module}" if node.level else node.module
        for alias in node.names:
            if (alias.asname or alias.name) == name and module and _file(module):
                return _defining_module(module, alias.name)
    return package


@functools.cache
def _names_of(package: str) -> tuple[ast.ImportFrom, ...]:
    """What a package's __init__ imports; where that is lazy, its stub says so."""
    file = _file(package)
    if file is None or file.name != "__init__.py":
        return ()
    stub = file.with_suffix(".pyi")
    text = (stub if stub.is_file() else file).read_text(encoding="utf-8")
    return tuple(node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom))


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, less those below `if TYPE_CHECKING:`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


@functools.cache
def _file(name: str) -> Path | None:
    """The file of a module of this project, None for all others."""
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").is_file():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").is_file() else None


@functools.cache
def _tree(name: str) -> ast.Module:
    file = _file(name)
    assert file is not None
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def _module_fingerprint(name: str) -> str:
    counted = _canonical(_tree(name))
    file = _file(name)
    assert file is not None
    if (data := file.with_suffix(".yaml")).is_file():
        counted += repr(yaml.safe_load(data.read_text(encoding="utf-8")))  # not its comments
    if (template := file.with_suffix(".html")).is_file():
        counted += template.read_text(encoding="utf-8")
    return hashlib.sha256(counted.encode()).hexdigest()


def _canonical(node: object) -> str:
    """A syntax tree as text, alike in every version of Python and however it is laid out."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"Raise({_canonical(node.exc.func)})"  # not its message
    fields = []
    for field, value in ast.iter_fields(node):
        # Python versions add fields, empty for what earlier ones could write.
        if value is None or value == [] or field in ("ctx", "kind", "type_comment", "type_ignores"):
            continue
        if field == "body" and isinstance(value, list):
            value = [statement for statement in value if not _is_text(statement)]
        # Of a key of params: words for people.
        if field == "keywords":
            value = [keyword for keyword in value if keyword.arg != "description"]
        fields.append(f"{field}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _is_text(node: ast.AST) -> bool:
    """A docstring, or another text that nothing reads."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _accepted(work: WorkFolder) -> dict[str, str]:
    return read_json(work.root / "accepted.json", {})
