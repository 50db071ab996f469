"""The rooms of CONTRIBUTING.md: who may import whom, and which room holds which library."""

from pathlib import Path

import pytest
import yaml
from import_closure import ROOT, closure, imported_names, modules

# What each room may import of the others.
ARROWS = {
    "pipeline": set(),
    "cache": set(),
    "corpora": set(),
    "miniature": {"corpora"},
    "app": {"pipeline", "cache", "corpora", "miniature"},
    "stages": {"pipeline", "cache", "corpora", "miniature", "app"},
    "benchmarks": {"pipeline", "cache", "corpora", "miniature"},
}
# Libraries that only one place may import.
KEEPERS = {
    "zarr": "cache/",
    "numcodecs": "cache/",
    "dask": "cache/",
    "distributed": "cache/",
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
    for module in modules():
        if module.parts[0] in ("corpora", "cache"):
            names = {name.split(".")[0] for name in imported_names(module)}
            assert not names & {"torch", "transformers", "diffusers"}, module


def _stages() -> dict[str, dict]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


@pytest.mark.parametrize("stage", sorted(_stages()))
def test_declared_code_is_the_real_import_closure(stage):
    """DVC does not see an undeclared dependency, and then says "up to date" wrongly."""
    module = Path("stages") / f"{stage.replace('-', '_')}.py"
    real = {f.as_posix() for f in closure(module)}
    declared = {d for d in _stages()[stage]["deps"] if isinstance(d, str) and d.endswith(".py")}
    missing, needless = sorted(real - declared), sorted(declared - real)
    assert (missing, needless) == ([], []), (
        f"dvc.yaml, stage {stage}: add to deps {missing}, remove {needless}"
    )


@pytest.mark.parametrize("stage", sorted(_stages()))
def test_every_stage_has_a_story_and_a_command(stage):
    definition = _stages()[stage]
    assert definition["desc"]
    assert definition["cmd"] == f"stages {stage}"
