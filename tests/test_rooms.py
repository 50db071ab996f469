"""The rooms of CONTRIBUTING.md: who may import whom, and which room holds which library."""

import pytest
import yaml
from import_closure import ROOT, imported_names, modules

from workfolder import deciding_modules
from workfolder.code import imported_modules
from workfolder.deciding import MODULES

# What each room may import of the others; CONTRIBUTING.md has the same table. The modules beside
# the rooms (`gill_errors`, `gill_files` ...) may be imported everywhere.
ARROWS = {
    "pipeline": set(),
    "cache": set(),
    "cluster": set(),
    "corpora": set(),
    "workfolder": set(),
    "miniature": {"corpora"},
    "settings": {"pipeline", "cache", "cluster", "corpora"},
    "gill": {"settings", "pipeline", "cache", "corpora", "miniature", "workfolder"},
    "evaluation": {
        *("gill", "settings", "pipeline", "cache", "cluster", "corpora", "miniature", "workfolder")
    },
    "doctor": {"gill", "settings", "pipeline", "cache", "corpora", "cluster", "miniature"},
    "app": {"gill", "settings", "pipeline", "cache", "corpora", "workfolder"},
    "stages": {
        *("gill", "settings", "pipeline", "cache", "cluster", "corpora", "miniature"),
        *("workfolder", "evaluation", "doctor", "app"),
    },
    "benchmarks": {
        *("app", "gill", "settings", "pipeline", "cache", "cluster", "corpora", "miniature"),
        "doctor",
    },
}
# Within pipeline; `settings` and `devices` belong to all.
SUB_ROOMS = {
    "frozen": set(),
    "bridge": {"frozen"},
    "training": {"bridge", "frozen"},
    "talking": {"bridge", "frozen"},
}
# Libraries that only one place may import.
KEEPERS = {
    "zarr": "cache/",
    "numcodecs": "cache/",
    "dask": "cluster/",
    "distributed": "cluster/",
    "typer": "stages/",
    "open_clip": "pipeline/frozen/visual_encoder.py",
    "faiss": ("pipeline/talking/retrieval.py", "pipeline/talking/index_files.py"),
}
# Side-by-side measurements and recipes that make a model need the library itself.
EXEMPT = {"benchmarks", "miniature"}


@pytest.mark.parametrize("module", modules(), ids=str)
def test_rooms_import_only_along_the_arrows(module):
    room = module.parts[0]
    others = {name.split(".")[0] for name in imported_names(module)} & set(ARROWS) - {room}
    assert others <= ARROWS[room], f"{module} imports {sorted(others - ARROWS[room])}"


@pytest.mark.parametrize("module", modules(), ids=str)
def test_libraries_stay_with_their_keepers(module):
    if module.parts[0] in EXEMPT:
        pytest.skip("measures or makes models with the library itself")
    for name in imported_names(module):
        keeper = KEEPERS.get(name.split(".")[0])
        assert keeper is None or module.as_posix().startswith(keeper), (
            f"{module} imports {name}, which only {keeper} may"
        )


@pytest.mark.parametrize("module", modules(), ids=str)
def test_the_room_pipeline_is_never_shadowed(module):
    assert "transformers.pipeline" not in imported_names(module)


def test_corpora_and_cache_know_no_tensor():
    """But for what hands the cache to PyTorch's loaders, and torch's casts of numbers."""
    others = ("cache/torch_rows.py", "cache/casting.py")
    for module in modules():
        if module.parts[0] in ("corpora", "cache") and module.as_posix() not in others:
            names = {name.split(".")[0] for name in imported_names(module)}
            assert not names & {"torch", "transformers", "diffusers"}, module


def _stages() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_dvc_watches_all_code_that_decides(kind):
    """DVC does not see an undeclared dependency, and then says "up to date" wrongly."""
    stages = {"candidates": "build-index", "training": "train", "index": "build-index"}
    stages |= {"features": "precompute-features", "targets": "precompute-targets"}
    stages |= {"miniature": "prepare-captions", "decision": "fit-decision", "report": "report"}
    declared = _stages()[stages.get(kind, "evaluate")]["deps"]
    for name in deciding_modules(MODULES[kind]):
        file = name.replace(".", "/")
        assert any(f"{file}.py".startswith(f"{d}/") or d == f"{file}.py" for d in declared), (
            f"dvc.yaml: {name} decides {kind}, and no dependency of its stage covers it"
        )


def test_dvc_yaml_is_a_story():
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 210
    assert "persist" not in text


@pytest.mark.parametrize("module", [m for m in modules() if m.parts[0] == "pipeline"], ids=str)
def test_parts_of_the_pipeline_import_only_along_the_arrows(module):
    if len(module.parts) < 3:
        return
    part = module.parts[1]
    names = {n.split(".")[1] for n in imported_names(module) if n.startswith("pipeline.")}
    others = names & set(SUB_ROOMS) - {part}
    assert others <= SUB_ROOMS[part], f"{module} imports {sorted(others - SUB_ROOMS[part])}"


def test_no_module_imports_itself_by_another():
    """No cycle, lazy imports included."""
    arrows = {
        name: set(imported_modules(name)) - {name}
        for name in (".".join(m.with_suffix("").parts) for m in modules())
        if not name.endswith("__init__")
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in arrows.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("stage", sorted(_stages()))
def test_every_stage_has_a_story_and_a_command(stage):
    definition = _stages()[stage]
    assert definition["desc"]
    assert definition["cmd"] == f"stages {stage}"
