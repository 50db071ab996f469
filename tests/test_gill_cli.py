"""The command line `gill`, on tiny models."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from corpora.records import CaptionedImage
from evaluation.sources import Source
from evaluation.store import EvaluationStore
from evaluation.texts import captioning
from gill.loading import Gill, read_caption_prompt, read_generation
from gill_errors import GillError
from miniature.drawing import render
from miniature.world import SCENES
from pipeline.settings import GenerationSettings
from pipeline.talking.captioning import first_sentence
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, decode
from settings.evaluation import EvaluationParams
from stages import gill_cli
from tests.tiny_gill import FEW, tiny_gill

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def gill() -> Gill:
    return tiny_gill()


@pytest.fixture
def run(gill, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gill_cli, "_load", lambda artifacts: gill)
    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "photo.png")

    def invoke(*arguments: str, typed: str | None = None, code: int = 0) -> str:
        result = CliRunner().invoke(gill_cli.app, list(arguments), input=typed)
        assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
        return result.output

    return invoke


def test_ask_answers_with_what_the_run_was_set_up_for(run):
    [made] = json.loads(run("ask", "a red ring.", "photo.png", "--want", "generate", "--json"))
    assert (made["kind"], made["steps"], made["guidance"], made["seed"]) == (
        "generated", FEW.steps, FEW.guidance, 0)  # fmt: skip
    assert Image.open(made["path"]).size == (64, 64)
    [other] = json.loads(
        run("ask", "a red ring.", "--want", "generate", "--json", "--steps", "2", "--seed", "9",
            "--candidates", "3", "--scheduler", "euler", "--negative-prompt", "blue", "--out", "o")
    )  # fmt: skip
    assert (other["steps"], other["guidance"], other["scheduler"]) == (2, FEW.guidance, "euler")
    assert 9 <= other["seed"] < 12
    assert (other["negative_prompt"], other["path"]) == ("blue", str(Path("o", "001", "00.png")))
    [found] = json.loads(run("ask", "a red ring.", "--want", "retrieve", "--json"))
    assert (found["kind"], found["source"]) == ("retrieved", f"{found['caption']}.png")
    assert re.fullmatch(
        r"\[generated picture: answer.003.00.png, seed 0, 3 steps, guidance 2.5\]\n",
        run("ask", "a red ring.", "--want", "generate"),
    )


def test_every_knob_of_the_command_is_one_of_the_model(gill):
    options = inspect.signature(gill_cli.ask).parameters.keys() - {
        "parts", "artifacts", "out", "as_json", "system"}  # fmt: skip
    knobs = gill.settings().model_dump()
    flat = knobs | knobs["decoding"] | knobs["generation"]
    assert options <= flat.keys()
    assert options == inspect.signature(gill_cli.chat).parameters.keys() - {
        "artifacts", "out", "as_json", "system"}  # fmt: skip


def test_knobs_change_one_thing_and_refuse_nonsense(gill):
    settings = gill.settings(steps=7, temperature=0.5, want="text", guidance=None)
    assert (settings.generation.steps, settings.generation.guidance) == (7, FEW.guidance)
    assert (settings.decoding.temperature, settings.decoding.stop_at_newline) == (0.5, True)
    assert settings.want == "text"
    with pytest.raises(GillError, match="no knob tempreture; there are: .*temperature"):
        gill.settings(tempreture=1)
    with pytest.raises(GillError, match="no knob decoding"):
        gill.settings(decoding={})
    with pytest.raises(GillError, match=r"top_p: .*less than or equal to 1 \(found 2\)"):
        gill.settings(top_p=2)


def test_the_run_s_own_params_say_how_pictures_are_sampled(tmp_path):
    params = tmp_path / "params.yaml"
    assert read_generation(params) == GenerationSettings()
    params.write_text("generation: {steps: 12, guidance: 2.5}\nindex: {kind: flat}\n")
    assert read_generation(params) == GenerationSettings(steps=12, guidance=2.5)
    params.write_text("index: {kind: flat}\n")
    assert read_generation(params) == GenerationSettings()
    params.write_text("generation: {steps: none}\n")
    with pytest.raises(GillError, match=r"params.yaml: the section `generation`"):
        read_generation(params)


def answers_of(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_chat_remembers_and_goes_on_after_an_error(run):
    typed = "in the sea\nnothing.png\n\n/generate it photo.png turns\n/new\n/text Q: what? A:\n"
    output = run("chat", "--json", "--max-tokens", "4", typed=f"{typed}quit\nnever read\n")
    assert "error: nothing.png: missing" in output
    answers = answers_of(output)
    assert len(answers) == 3
    assert [one["kind"] for one in answers[1]["answer"]] == ["generated"]
    [path] = [one["path"] for one in answers[1]["answer"]]
    assert Image.open(path).size == (64, 64)
    assert {one["kind"] for one in answers[2]["answer"]} == {"text"}


@pytest.mark.parametrize("end", ["quit\n", "exit\n", ""])
def test_a_talk_ends_and_keeps_its_pictures_in_its_own_folder(run, end):
    for number in (1, 2):
        plain = run("chat", "--want", "generate", typed=f"a ring.\na cross.\n{end}")
        assert plain.count("[generated picture:") == 2
        assert [p.name for p in sorted(Path(f"answer/{number:03d}").iterdir())] == [
            "00.png", "01.png"]  # fmt: skip
    run("ask", "a ring.", "--want", "generate")
    assert sorted(p.name for p in Path("answer").iterdir()) == ["001", "002", "003"]


def test_a_turn_is_asked_again_and_otherwise(run):
    typed = "/again\na red ring.\n/again\n/retrieve\n/again\n/generate\n/text\n/generate a cross\n"
    output = run("chat", "--json", "--want", "generate", typed=typed)
    assert "error: nothing was asked yet: say something first" in output
    first, again, found, other, made, words, cross = (one["answer"] for one in answers_of(output))
    assert [one["kind"] for one in first] == [one["kind"] for one in again] == ["generated"]
    assert first[0]["seed"] == 0 != again[0]["seed"]
    assert (found[0]["kind"], other[0]["kind"]) == ("retrieved", "retrieved")
    assert found[0]["source"] != other[0]["source"], "not the same one again"
    assert made[0]["kind"] == "generated"
    assert {one["kind"] for one in words} == {"text"}
    assert cross[0]["kind"] == "generated"


def test_a_turn_asked_again_is_remembered_once(run):
    """The next answer is the one after a single first turn."""
    settings = ["--json", "--max-tokens", "6", "--want", "text"]
    once = answers_of(run("chat", *settings, typed="a red ring\nit\n"))
    twice = answers_of(run("chat", *settings, typed="a red ring\n/again\nit\n"))
    assert twice[0] == twice[1] == once[0]
    assert twice[2] == once[1]
    forgotten = answers_of(run("chat", *settings, typed="a red ring\n/new\nit\n"))
    assert forgotten[1] == answers_of(run("chat", *settings, typed="it\n"))[0] != once[1]


def test_a_talk_is_saved_and_nothing_is_overwritten(run):
    typed = "a red ring photo.png\n" + "/save talks/one.json\n" * 2 + "/save one.html\n/save x\n"
    output = run("chat", "--want", "generate", typed=typed)
    assert "error: talks/one.json exists: choose another name" in output
    assert "error: x: name a file that ends in .html or .json" in output
    [exchange] = json.loads(Path("talks/one.json").read_text())["exchanges"]
    assert [piece["kind"] for piece in exchange["turn"]] == ["text", "picture"]
    assert exchange["answer"][-1]["kind"] == "generated"
    page = Path("one.html").read_text()
    assert "a red ring" in page
    assert page.count("data:image/png;base64,") == 2


def test_help_lists_every_command_and_others_are_refused(run):
    output = run("chat", typed="/help\n/sing\n/again now\n")
    for command in ("/generate", "/retrieve", "/text", "/auto", "/again", "/save", "/new", "quit"):
        assert f"\n{command}" in output
    assert "error: /sing: no such command; /help lists them" in output
    assert "error: /again now: no such command" in output


def test_the_help_needs_no_heavy_library():
    code = "import sys, stages.gill_cli; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "diffusers", "faiss", "numpy", "PIL", "pyarrow", "pydantic"}
    assert not heavy & set(ran.stdout.split())


def test_asking_imports_nothing_that_it_does_not_need():
    code = "import sys, gill.loading, app.terminal.narrator; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    needless = {
        "dask",
        "evaluation",
        "fastapi",
        "gradio",
        "matplotlib",
        "pandas",
        "pyarrow.dataset",
    }
    needless |= {"sklearn", "stages.cli"}
    assert not needless & set(ran.stdout.split())


def test_a_command_that_answers_once_ends_with_its_exit_code(tmp_path):
    """It leaves without taking its libraries apart: nothing it has printed may be lost."""
    code = "from stages.gill_cli import main; main()"
    for arguments, expected in ((["caption", "none.png"], 1), (["caption", "--help"], 0)):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == expected
        assert ("no such file" in ran.stderr) == bool(expected), ran.stderr
        assert ("Say what is on pictures" in ran.stdout) != bool(expected), ran.stdout


def test_a_typed_line_is_split_at_picture_files(run):
    turn = gill_cli._turn("how does photo.png look at night")
    assert [type(part) is str for part in turn] == [True, False, True]
    assert (turn[0], turn[2]) == ("how does", "look at night")
    assert gill_cli._turn("see you. later.") == ["see you. later."]


def test_a_picture_is_known_by_its_file_and_words_are_words(run, tmp_path):
    photo = Image.open(tmp_path / "photo.png")
    for name in ("photo", "photo.jfif", "my photo.PNG", "photo.ppm", "photo.txt"):
        photo.save(tmp_path / name, "PPM" if name.endswith("ppm") else "PNG")
        assert gill_cli._part(name).size == (32, 32), name
    assert gill_cli._part(str(tmp_path / "photo")).size == (32, 32)
    (tmp_path / "notes.txt").write_text("a red ring")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    words = ("notes.txt", "called logo.png", "a ring.", "and/or", "1/2", "x" * 5000, "", "\0")
    for text in words:
        assert gill_cli._part(text) == text
    for name, reason in [
        ("absent.heic", "missing"), ("./absent", "missing"), ("/absent/photo", "missing"),
        ("damaged.png", "unreadable"), ("./notes.txt", "unreadable"),
    ]:  # fmt: skip
        assert f"error: {name}: {reason}" in run("ask", name, code=1)


def test_words_about_a_picture_file_are_words(run, tmp_path):
    for text in ("the picture is called logo.png", "x " * 400 + "logo.png", "a.\nlogo.PNG"):
        assert gill_cli._part(text) == text
    shutil.copy(tmp_path / "photo.png", tmp_path / "my photo.JFIF")
    assert gill_cli._part("my photo.JFIF").size == (32, 32)


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_place_where_no_answer_can_be_written_is_said_before_the_model_is_loaded(
    run, monkeypatch, tmp_path, command
):
    monkeypatch.setattr(gill_cli, "_load", lambda artifacts: pytest.fail("loaded"))
    words = ["a red ring."] if command == "ask" else []
    for out in ("photo.png", "photo.png/answers"):
        assert "photo.png is a file: name a folder" in run(command, *words, "--out", out, code=1)


def test_retrieve_prints_scores_pictures_and_captions(run):
    hits = json.loads(run("retrieve", "a red ring.", "photo.png", "-n", "3", "--json"))
    assert len(hits) == 3
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    first = run("retrieve", "a red ring.", "photo.png", "-n", "1")
    assert first == f"{hits[0]['score']:.3f}  {hits[0]['source']}  {hits[0]['caption']}\n"


@pytest.mark.parametrize("prompt", ["", "A picture of"])
def test_a_caption_is_the_one_that_the_evaluation_measures(run, gill, monkeypatch, prompt):
    """Byte for byte, and by hand: picture, start, prompt, then greedily to the first stop."""
    monkeypatch.setattr(gill, "caption_prompt", prompt)
    names = [f"{i}.png" for i in range(15)]
    for name, pixels in zip(names, render(SCENES[::40], 0)):
        Image.fromarray(pixels).save(name)
    images = [CaptionedImage(name, name, ("a ring.", "a cross.")) for name in names]
    store = EvaluationStore({"gill": Path("evaluation")})
    _, records = captioning(gill, Source(images, 15), EvaluationParams(), store)
    measured = [record.texts["gill"] for record in records]
    assert [run("caption", name) for name in names] == [f"{text}\n" for text in measured]
    together = json.loads(run("caption", *names, "--json"))
    assert [one["caption"] for one in together] == measured
    model = gill.model
    words = model.language_model
    ids = [*words.start_ids, *words.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    for name, text in zip(names, measured):
        pooled = gill.encoder.encode_pictures([Image.open(name).convert("RGB")])
        read = torch.cat([model.visual_prefix(pooled)[0], words.embed(torch.tensor(ids))])
        settings = DecodingSettings(max_tokens=32, max_images=0)
        [answer] = decode(model, Context(words), [read.detach()], settings)
        assert text == first_sentence(answer.text.strip().partition("\n")[0])
    assert len(set(measured)) > 1


def test_a_run_s_own_params_say_how_its_captions_begin(tmp_path):
    params = tmp_path / "params.yaml"
    assert read_caption_prompt(params) == "A picture of"
    params.write_text("captions: {table: photos.tsv}\n")
    assert read_caption_prompt(params) == "A picture of"
    for world in ("captions: {table: miniature}\n", "captions: {}\n", "index: {kind: flat}\n"):
        params.write_text(world)
        assert read_caption_prompt(params) == ""


def test_what_a_person_can_mend_is_one_line(run, monkeypatch, gill):
    for arguments, text in [
        (["ask", "look", "missing.png"], "missing.png: missing"),
        (["ask", "ring " * 300], "shorten the turn"),
        (["caption", "photo.png", "absent.jpg"], "absent.jpg: missing"),
    ]:
        output = run(*arguments, code=1)
        assert output.startswith("error: ")
        assert text in output
        assert len(output.splitlines()) == 1
    monkeypatch.undo()
    result = CliRunner().invoke(gill_cli.app, ["ask", "x", "--artifacts", "/nowhere/at/all"])
    assert result.exit_code == 1
    assert "run `stages prepare-backbones`" in result.output


def test_annotate_and_its_options_are_passed_on(run, tmp_path):
    result = CliRunner().invoke(gill_cli.app, ["annotate", str(tmp_path / "none"), "--export", "o"])
    assert result.exit_code == 1
    assert "pairs.json" in str(result.exception) + result.output
    assert CliRunner().invoke(gill_cli.app, ["annotate"]).exit_code == 2
