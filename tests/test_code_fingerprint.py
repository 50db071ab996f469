"""Which edits of code count: what computes a number does, what only says something does not."""

from pathlib import Path

import pytest

from workfolder import WorkFolder, accept_code, code, code_fingerprint, deciding_modules

SOURCE = '''"""What it is."""

from room.other import half
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from room.typed import Nothing


def double(x: int) -> int:
    """Twice."""
    # a remark
    if x < 0:
        raise ValueError("below zero")
    return 2 * x + half(x)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text('"""Room."""\n\nfrom room.main import double\n')
    (room / "main.py").write_text(SOURCE)
    (room / "other.py").write_text("def half(x):\n    return x / 2\n")
    (room / "typed.py").write_text("class Nothing:\n    pass\n")
    (room / "user.py").write_text("from room import double\n\nprint(double(1))\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return room


def fingerprint() -> str:
    for cached in (code._file, code._tree, code._module_fingerprint, code.imported_modules):
        cached.cache_clear()
    return code_fingerprint("room.user")


@pytest.fixture(autouse=True)
def _forget():
    yield
    for cached in (code._file, code._tree, code._module_fingerprint, code.imported_modules):
        cached.cache_clear()


def test_modules_are_found_through_what_a_package_hands_on(project: Path) -> None:
    fingerprint()
    assert deciding_modules("room.user") == ["room.main", "room.other", "room.user"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# a remark", "# another remark, longer"),
        ('"""Twice."""', '"""Two times x."""'),
        ('"""What it is."""', '"""."""'),
        ('"below zero"', 'f"{x} is below zero"'),
        ("2 * x + half(x)", "(2 * x) + half(\n        x\n    )"),
    ],
)
def test_what_computes_nothing_does_not_count(project: Path, old: str, new: str) -> None:
    before = fingerprint()
    assert old in SOURCE
    (project / "main.py").write_text(SOURCE.replace(old, new))
    assert fingerprint() == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ("x < 0", "x <= 0"),
        ("raise ValueError", "raise TypeError"),
        ("2 * x + half(x)", "2 * x - half(x)"),
    ],
)
def test_what_computes_counts(project: Path, old: str, new: str) -> None:
    before = fingerprint()
    assert old in SOURCE
    (project / "main.py").write_text(SOURCE.replace(old, new))
    assert fingerprint() != before


def test_an_imported_module_counts_and_a_type_hint_does_not(project: Path) -> None:
    before = fingerprint()
    (project / "typed.py").write_text("class Nothing:\n    x = 1\n")
    assert fingerprint() == before
    (project / "other.py").write_text("def half(x):\n    return x / 4\n")
    assert fingerprint() != before


def test_data_and_template_of_a_module_count_and_their_comments_do_not(project: Path) -> None:
    seen = [fingerprint()]
    for name, text in (("main.yaml", "a: 1"), ("main.yaml", "a: 2"), ("main.html", "<p>")):
        (project / name).write_text(text)
        seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    (project / "main.yaml").write_text("# a remark\na: 2\n")
    (project / "unused.yaml").write_text("b: 1")
    assert fingerprint() == seen[-1]


def test_accepted_code_is_the_code_that_it_equals(project: Path, tmp_path: Path) -> None:
    work = WorkFolder.open(str(tmp_path / "w"), tmp_path)
    first = fingerprint()
    (project / "main.py").write_text(SOURCE.replace("2 * x", "x + x"))
    second = fingerprint()
    assert second != first
    accept_code(work, second, first)
    assert code_fingerprint("room.user", work) == first
    (project / "main.py").write_text(SOURCE.replace("2 * x", "x * 2"))
    third = fingerprint()
    accept_code(work, third, second)  # accepted code stands for what it was accepted as
    assert code_fingerprint("room.user", work) == first


def test_the_stages_decide_by_their_own_code() -> None:
    training = deciding_modules("stages.head_training")
    bridge = {f"pipeline.bridge.{name}" for name in ("mapper", "losses", "objective")}
    assert bridge <= set(training)
    aside = ("app.", "cache.inspecting", "cache.progress", "pipeline.talking", "settings.")
    assert not [name for name in training if name.startswith(aside)]
    features = deciding_modules("stages.feature_store")
    assert "pipeline.frozen.visual_encoder" in features
    assert not [n for n in features if n.startswith(("pipeline.bridge", "pipeline.training"))]
