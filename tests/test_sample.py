"""Pictures for the prompts of benchmarks: where they lie, from which seeds, made once."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stage_runs import refusal, run, write_params

from corpora.benchmark_prompts import read_benchmark_prompts
from corpora.records import CorpusError
from gill.loading import Gill
from miniature.backbones import SHIPPED
from pipeline.frozen.backbones import Backbones
from pipeline.frozen.pinning import resolve_backbone
from pipeline.talking.generation import generate_pictures
from pipeline.talking.reading import read_contexts
from stages import sample
from tests.tiny_gill import tiny_gill

PROMPTS = ["a red ring.", "a green cross.", "a blue ring."]
GENEVAL = [json.dumps({"tag": "colors", "prompt": prompt}) for prompt in PROMPTS]
ROLES = ("language_model", "visual_encoder", "image_generator")


@pytest.fixture(scope="module")
def gill():
    here = {role: resolve_backbone(role, str(getattr(SHIPPED, role))) for role in ROLES}
    return dataclasses.replace(tiny_gill(), backbones=Backbones(**here))


@pytest.fixture
def made(gill, monkeypatch, tmp_path):
    """A folder to run in, and the seeds of every picture that is made."""
    monkeypatch.chdir(tmp_path)
    write_params(generation={"steps": 2, "guidance": 2.0})
    monkeypatch.setattr(Gill, "load", classmethod(lambda cls, *a, **k: gill))
    monkeypatch.setattr(sample, "fingerprint_heads", lambda path: "h")
    seeds = []
    generate = gill.generator.generate

    def counted(*args, **options):
        seeds.extend(options["seeds"])
        return generate(*args, **options)

    monkeypatch.setattr(gill.generator, "generate", counted)
    return seeds


def files(folder: str) -> list[str]:
    below = Path(folder)
    return sorted(path.relative_to(below).as_posix() for path in below.rglob("*") if path.is_file())


def test_geneval_s_layout_and_going_on(gill, made):
    Path("evaluation_metadata.jsonl").write_text("\n".join(GENEVAL) + "\n")
    words = ("sample", "evaluation_metadata.jsonl", "--out", "out", "--samples", "2")
    assert "2 pictures for each of 3 prompts, 0 were there before" in run(*words)
    assert files("out") == [
        *(
            f"0000{i}/{name}"
            for i in range(3)
            for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
        ),
        "sampling.json",
    ]
    assert Path("out/00001/metadata.jsonl").read_text() == GENEVAL[1]
    assert made == [0, 1, 1000, 1001, 2000, 2001]
    # The picture is that of this prompt and seed, as elsewhere.
    hidden = read_contexts(gill.model, gill.encoder, [[PROMPTS[1]]])
    settings = gill.generation.model_copy(update={"steps": 2, "guidance": 2.0})
    (expected,) = generate_pictures(
        gill.generator, gill.model.conditioning(hidden), gill.empty_prompt, settings, 1001
    )
    written = Image.open("out/00001/samples/0001.png")
    np.testing.assert_array_equal(np.asarray(written), np.asarray(expected))
    assert (written.text["seed"], written.text["Software"]) == ("1001", "GILL")
    told = json.loads(Path("out/sampling.json").read_text())
    assert told["prompts_rewritten"] is False
    assert (told["benchmark"], told["heads"], told["generation"]["steps"]) == ("geneval", "h", 2)
    assert str(SHIPPED.language_model.parent) not in json.dumps(told)
    # Killed within the second prompt: only that one is made again.
    before = {name: Path("out", name).read_bytes() for name in files("out")}
    Path("out/00001/samples/0001.png").unlink()
    Path("out/00001/samples/.0001.png.1f.partial").write_bytes(b"half")
    made.clear()
    assert "2 were there before" in run(*words)
    assert made == [1000, 1001]
    assert {name: Path("out", name).read_bytes() for name in files("out")} == before


def test_pictures_made_otherwise_are_not_mixed(made):
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    run("sample", "prompts.txt", "--out", "out", "--samples", "1")
    assert files("out") == ["00000-0.png", "00001-0.png", "00002-0.png", "sampling.json"]
    assert "made otherwise (seed)" in refusal(
        "sample", "prompts.txt", "--out", "out", "--samples", "1", "--seed", "5"
    )
    Path("prompts.txt").write_text("\n".join(reversed(PROMPTS)) + "\n")
    assert "(prompts_sha256)" in refusal("sample", "prompts.txt", "--out", "out", "--samples", "1")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("kept")
    assert "is not empty" in refusal("sample", "prompts.txt", "--out", "mine", "--samples", "1")


def test_dpg_bench_s_grid(gill, made):
    Path("prompts").mkdir()
    for number, prompt in enumerate(PROMPTS[:2]):
        Path(f"prompts/COCOval{number}.txt").write_text(f"{prompt}\n")
    run("sample", "prompts", "--out", "out")
    assert files("out") == ["COCOval0.png", "COCOval1.png", "sampling.json"]
    grid = Image.open("out/COCOval1.png")
    width, height = gill.generator.picture_size
    assert grid.size == (2 * width, 2 * height)
    run("sample", "prompts", "--out", "out")  # nothing is left to do
    assert made == [0, 1, 2, 3, 1000, 1001, 1002, 1003]
    hidden = read_contexts(gill.model, gill.encoder, [[PROMPTS[1]]])
    settings = gill.generation.model_copy(update={"steps": 2, "guidance": 2.0})
    (third,) = generate_pictures(
        gill.generator, gill.model.conditioning(hidden), gill.empty_prompt, settings, 1002
    )
    lower_left = grid.crop((0, height, width, 2 * height))
    np.testing.assert_array_equal(np.asarray(lower_left), np.asarray(third))
    assert "a 2x2 grid of 4" in refusal("sample", "prompts", "--out", "b", "--samples", "2")


def test_prompts_that_cannot_be_read_are_named(tmp_path):
    lines = tmp_path / "evaluation_metadata.jsonl"
    lines.write_text(f'{GENEVAL[0]}\n{{"tag": "colors"}}\n')
    with pytest.raises(CorpusError, match=r'jsonl:2: no object with a "prompt"'):
        read_benchmark_prompts(lines)
    with pytest.raises(CorpusError, match=r"no \.txt in it"):
        read_benchmark_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(CorpusError, match=r"a\.txt: no prompt in it"):
        read_benchmark_prompts(tmp_path)
    with pytest.raises(CorpusError, match="none is missing"):
        read_benchmark_prompts(tmp_path / "none")


def test_parti_prompts_as_released(shared_data):
    benchmark, rows = read_benchmark_prompts(shared_data / "parti_prompts" / "PartiPrompts.tsv")
    assert benchmark == "parti"
    assert (len(rows), rows[0].name, rows[0].prompt) == (1632, "00000", "bond")
