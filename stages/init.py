"""Command init: a folder of one's own in which `dvc repro` runs, after `pip install`."""

from __future__ import annotations

import re
from pathlib import Path

from gill_errors import StageError
from settings.params import read_params
from stages import plots_page
from workfolder import place_link

PRESETS = Path(__file__).resolve().parents[1] / "presets"
_INPUTS = ("captions", "backbones", "replies", "train", "candidates", "decision", "evaluation")
_CODE = Path("inputs/code")
_FILES = {
    ".gitignore": "/artifacts/\n/work/\n/answer/\n/dvc_plots/\n/inputs/*/*\n!/inputs/*/.gitkeep\n",
    ".dvcignore": "work\n__pycache__\n.venv\n",
    ".dvc/.gitignore": "/config.local\n/code\n/tmp\n/cache\n/plots.html\n",
}


def preset_file(name: str) -> Path:
    """The params file of a preset. Raises StageError naming those that there are."""
    path = PRESETS / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))
        raise StageError(f"--preset {name}: there is no such preset; there are {there}")
    return path


def run(preset: str, table: str | None, folder: Path = Path()) -> None:
    """Write dvc.yaml, params.yaml and what git and DVC need, where none of them is yet.

    The stages' code is installed, not here: the link inputs/code lets DVC see when it changes.

    In a folder that `init` made elsewhere, as in a clone, only that link is made anew.

    Raises StageError where a file of these names is there, or `table` is not.
    """
    if (folder / "dvc.yaml").is_file() and (folder / _CODE).is_symlink():
        link_code(folder)
        print("inputs/code leads to the code that is installed here; nothing else was changed")
        return
    params = preset_file(preset).read_text(encoding="utf-8")
    if table is not None:
        if not Path(table).exists():
            raise StageError(f"--table {table}: there is no such file or folder")
        params = re.sub(r"(?m)^(captions:\n(?:  #.*\n)*  table: ).*$", rf"\g<1>{table}", params)
    story = (PRESETS / "dvc.yaml.template").read_text(encoding="utf-8")
    files = {
        # All but what stages make and the user's own files is code, which is not here.
        "dvc.yaml": re.sub(
            r"(?m)^(      - )(?!artifacts/|inputs/|metrics/)(?=\w+(/\w+)*$)",
            r"\1inputs/code/",
            story,
        ),
        "params.yaml": params,
        ".dvc/config": _config(folder),
        **_FILES,
    }
    there = [name for name in files if (folder / name).exists() and name != ".gitignore"]
    if there:
        raise StageError(f"{', '.join(there)}: there already; init writes into an empty folder")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:  # a .gitignore that is there stays
            stream.write(text)
    for name in _INPUTS:
        (folder / "inputs" / name).mkdir(parents=True, exist_ok=True)
        (folder / "inputs" / name / ".gitkeep").touch()
    link_code(folder)
    plots_page.write(folder / plots_page.PAGE)
    read_params(folder / "params.yaml")
    print(f"written: {', '.join(files)}. Now: dvc repro")


def link_code(folder: Path = Path()) -> None:
    """Where `init` made the folder: a link to the installed rooms that its dvc.yaml names.

    It is committed: DVC's copies of the repository for experiments need it too. On another machine
    it leads nowhere until a stage, or `init`, makes it anew; what it leads to is what counts. It
    leads to a folder of links, because DVC looks into no repository within another, and the code
    may be a clone of its own.
    """
    story = (folder / "dvc.yaml").read_text(encoding="utf-8")
    rooms = sorted(set(re.findall(rf"(?m)^      - {_CODE}/(\w+)", story)))
    if all((folder / _CODE / room).resolve() == PRESETS.parent / room for room in rooms):
        return
    for room in rooms:
        place_link(PRESETS.parent / room, folder / ".dvc" / "code" / room)
    place_link(folder / ".dvc" / "code", folder / _CODE)


def _config(folder: Path) -> str:
    config = "[core]\n    analytics = false\n    autostage = false\n    check_update = false\n"
    plots = "[plots]\n    html_template = plots.html\n"
    has_git = any(
        (parent / ".git").exists() for parent in [folder.resolve(), *folder.resolve().parents]
    )
    return config + ("" if has_git else "    no_scm = true\n") + plots
