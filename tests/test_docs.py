"""What README.md and the pages of the site say can be typed, linked to and set, can be."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from import_closure import modules
from pydantic import BaseModel
from test_rooms import ARROWS

from app.serving.settings import ServiceSettings
from settings.params import Params
from stages.cli import app as stages_app
from stages.gill_cli import app as gill_app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
}
COMMANDS = {
    name: typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, app in (("stages", stages_app), ("gill", gill_app))
}
FILES = {"py", "md", "yaml", "zarr", "json", "parquet", "safetensors", "tsv"}
OWN_OPTIONS = {"annotate": {"--export", "--host", "--port", "--help"}}
"""Of the command that reads its own."""


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    fenced = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [block for language, block in fenced if language in languages]


def typed(text: str) -> Iterator[list[str]]:
    """What is typed after each prompt of the console blocks, and in `stages ...` within a line."""
    for block in blocks(text, "console"):
        whole = re.sub(r"\\\n\s*(> )?", "", block)
        for line in re.findall(r"^\$ (.*)$", whole, re.M):
            for command in line.split("&&"):
                yield shlex.split(command, comments=True)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for command in re.findall(r"`((?:stages|gill|make) [^`]*)`", prose):
        yield shlex.split(command.replace("'", ""), comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in typed(PAGES[page]):
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]  # a variable of the environment
        match words:
            case ["make", target, *_]:
                assert target in targets, f"make {target}"
            case ["stages" | "gill" as program, name, *rest] if not name.startswith("-"):
                assert name in COMMANDS[program], f"{program} {name}"
                options = {word.split("=")[0] for word in rest if word.startswith("-")}
                command = COMMANDS[program][name]
                known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
                known |= OWN_OPTIONS.get(name, {"--help"})
                assert options <= known, f"{program} {name}: {sorted(options - known)}"


def keys(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of a section; a value is the keys below it, or None."""
    return {
        name: keys(field.annotation)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        else None
        for name, field in model.model_fields.items()
    }


def unknown(given: Any, known: Any, path: str = "") -> list[str]:
    """Keys that are not known; what is below a key without sections is not looked at."""
    if not isinstance(given, dict) or known is None:
        return []
    wrong = [f"{path}{name}" for name in given if name not in known]
    for name in given.keys() & known.keys():
        wrong += unknown(given[name], known[name], f"{path}{name}.")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_params_that_are_shown_exist(page: str) -> None:
    known = keys(Params)
    for block in blocks(PAGES[page], "yaml"):
        given = yaml.safe_load(block.replace("...", "null"))
        is_params = set(given) <= set(known)
        assert not unknown(given, known if is_params else keys(ServiceSettings)), block
    for section, rest in re.findall(r"`([a-z_]+)\.([a-z_0-9.]+)[:` ]", PAGES[page]):
        if section in known and rest.split(".")[-1] not in FILES:
            place: Any = known[section]
            for name in rest.split("."):
                assert place is None or name in place, f"{section}.{rest}"
                place = place and place[name]


def anchors(text: str) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", PAGES[page])):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


class _Names(yaml.SafeLoader):
    """mkdocs.yml names Python objects, which are none of this test's business."""


_Names.add_multi_constructor("tag:", lambda loader, suffix, node: suffix)


def navigation(entries: Any) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in entries:
        inside = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from [inside] if isinstance(inside, str) else navigation(inside)


def test_every_page_is_in_the_navigation_once() -> None:
    pages = list(navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), _Names)["nav"]))
    written = itertools.chain(DOCS.rglob("*.md"), DOCS.rglob("*.ipynb"))
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in written)
    assert len({Path(page).with_suffix("") for page in pages}) == len(pages), "two make one file"


def test_the_reference_covers_every_module() -> None:
    text = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    covered = set(re.findall(r"^::: ([\w.]+)$", text, re.M))
    for module in modules():
        if module.name == "__init__.py" or module.parts[0] not in set(ARROWS) - {"benchmarks"}:
            continue
        names = [*module.parts[:-1], module.stem]
        parents = {".".join(names[:i]) for i in range(1, len(names) + 1)}
        assert parents & covered, f"{module} is on no page of docs/reference"


def test_all_forty_five_differences_are_told() -> None:
    text = PAGES["docs/differences.md"]
    assert re.findall(r"^\| (\d+) \|", text, re.M) == [str(i) for i in range(1, 46)]


def test_the_first_steps_have_the_words_of_the_readme() -> None:
    pages = ("docs/getting-started.md", "docs/howto/hub.md")
    steps = [words for page in pages for words in typed(PAGES[page]) if words]
    for words in typed(PAGES["README.md"]):
        if words[:1] in (["gill"], ["make"]) and words[:2] not in (
            ["make", "test"],
            ["make", "docs"],
            ["make", "test-lowest"],
        ):
            assert words in steps, words
