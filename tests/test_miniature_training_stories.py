"""Stories to train on: both forms hold the same, and nothing of what evaluation holds out."""

from pathlib import Path

import pytest
from PIL import Image

from corpora.documents import InterleavedDocument, read_documents
from miniature.oracle import read_scenes
from miniature.training_stories import main
from miniature.world import SCENES_OF, Scene


def test_both_forms_tell_the_same_stories_of_training_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path), "--stories", "6", "--seed", "3"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "stories.jsonl")
    forms = []
    for name in ("stories.json", "stories.jsonl"):
        found = list(read_documents(str(tmp_path / name), str(tmp_path / "pictures")))
        assert len(found) == 6
        assert all(isinstance(one, InterleavedDocument) for one in found)
        forms.append(
            [[p if isinstance(p, str) else Path(p.image).name for p in one.parts] for one in found]  # type: ignore[union-attr]
        )
    assert forms[0] == forms[1]
    files = sorted((tmp_path / "pictures").iterdir())
    assert len(files) == 30
    seen = read_scenes([Image.open(file) for file in files])
    allowed = {Scene.codes.fget(scene) for scene in SCENES_OF["train"]}  # type: ignore[attr-defined]
    assert {tuple(codes) for codes in seen.tolist()} <= {tuple(codes) for codes in allowed}
