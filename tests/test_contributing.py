"""What CONTRIBUTING.md and the help texts say of the tree is true."""

import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from test_rooms import ARROWS

from stages.cli import app

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def tree() -> list[tuple[Path, int]]:
    """Paths of the tree in CONTRIBUTING.md with their depth in it."""
    block = CONTRIBUTING[CONTRIBUTING.index("## The tree") :].split("```")[1]
    found: list[tuple[Path, int]] = []
    parents: list[str] = []
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name.rstrip("/")]
        found.append((Path(*parents), depth))
    return found


@pytest.mark.parametrize("path", [path for path, _ in tree()], ids=str)
def test_every_path_of_the_tree_is_there(path: Path) -> None:
    assert (ROOT / path).exists()


def test_every_room_is_in_the_tree() -> None:
    told = {path.as_posix() for path, depth in tree() if depth == 0}
    assert set(ARROWS) <= told


def test_contributing_has_the_table_that_the_imports_are_held_to() -> None:
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", CONTRIBUTING, re.M)
    table = {room: set(re.findall(r"`(\w+)`", may)) for room, may in rows}
    everyone = set(ARROWS) - {"benchmarks", "stages"}
    table["stages"] = everyone  # "all but benchmarks"
    assert table == ARROWS


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))  # type: ignore[attr-defined]
def test_help_names_files_that_the_stage_really_writes(name: str) -> None:
    text = typer.main.get_command(app).commands[name].help or ""  # type: ignore[attr-defined]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert re.search(r"Reads |Writes |As run-variant", text), (
        f"stages {name} --help says not what it reads"
    )
    if name not in stages:
        return
    written = text.split("Writes ", 1)[1]
    outs = [
        out if isinstance(out, str) else next(iter(out))
        for kind in ("outs", "metrics")
        for out in stages[name].get(kind, [])
    ]
    links = {f"precompute-{store}": store for store in ("features", "targets", "latents")}
    extra = [f"artifacts/{links[name]}.zarr"] if name in links else ["artifacts/miniature"]
    for path in re.findall(r"(?:artifacts|metrics)/[\w./-]*[\w]", written):
        assert any(o.startswith(path) or path.startswith(o) for o in [*outs, *extra]), path
    for out in outs:
        known = [*re.findall(r"[\w./-]*[\w]", written), "metrics/evaluation.json"]
        assert any(
            out == n
            or out.startswith(n.rstrip("/") + "/")
            or Path(out).name == n
            or n.startswith(f"{out}/")
            for n in known
            if "/" in n or "." in n
        ), f"stages {name} writes {out}, and its help does not say so"


def test_the_changelog_is_kept_in_its_form() -> None:
    """https://keepachangelog.com: a section for what is not released, then versions with dates."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", v) for v in versions[1:])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert versions[1].startswith(f"[{version}]"), "the version of pyproject.toml has no section"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds


def test_the_citation_is_whole() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["license"] == project["license"]
    (paper,) = cited["references"]
    assert paper["title"] == "Generating Images with Multimodal Language Models"


def test_what_is_supported_is_what_is_declared() -> None:
    """README's sentence, pyproject.toml, and the versions that are pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (said,) = re.findall(
        r"Python from (\S+), torch from (\S+), transformers from (\S+), on Linux",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    lowest = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    assert said == (
        project["requires-python"].removeprefix(">="), lowest["torch"], lowest["transformers"]
    )  # fmt: skip
