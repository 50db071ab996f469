"""The released checkpoint format, against released files and files of the same layout."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.upstream import (
    ARGUMENTS_FILE,
    DECISION_FILE,
    HEADS_FILE,
    UpstreamError,
    export_decision,
    export_heads,
    import_decision,
    import_heads,
    read_arguments,
    released_arguments,
)
from pipeline.settings import MapperSizes

SIZES = HeadSizes(
    d=6,
    e=10,
    k=2,
    r=3,
    L=5,
    D=7,
    m=8,
    p=4,
    mapper=MapperSizes(encoder_layers=1, decoder_layers=2, feedforward=2, adds_embedding=True),
)


@pytest.fixture
def heads() -> Heads:
    torch.manual_seed(0)
    return Heads(SIZES)


@pytest.fixture
def exported(heads: Heads, tmp_path: Path) -> Path:
    arguments = released_arguments(
        SIZES, language_model="facebook/opt-6.7b", visual_encoder="openai/clip", num_tokens=600
    )
    export_heads(heads, arguments, tmp_path)
    return tmp_path


def edit(folder: Path, change) -> None:
    """Rewrite the exported tensors after `change(state)`."""
    state = torch.load(folder / HEADS_FILE, weights_only=True)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, folder / HEADS_FILE)


def test_export_then_import_is_bit_exact(heads, exported):
    again, arguments = import_heads(exported)
    assert again.sizes == SIZES
    assert arguments.retrieval_token_idx == arguments.gen_token_idx == (601, 602, 603)
    assert again.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_bfloat16_files_repeat_bit_by_bit(heads, exported, tmp_path):
    _, arguments = import_heads(exported)
    first, second = tmp_path / "first", tmp_path / "second"
    export_heads(heads, arguments, first, dtype=torch.bfloat16)
    export_heads(import_heads(first)[0], arguments, second, dtype=torch.bfloat16)
    a, b = (
        torch.load(folder / HEADS_FILE, weights_only=True)["state_dict"]
        for folder in (first, second)
    )
    assert a.keys() == b.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, b[name]) for name, t in a.items())


def test_released_names_and_shapes(exported):
    state = torch.load(exported / HEADS_FILE, weights_only=True)["state_dict"]
    assert state["model.gen_text_hidden_fcs.0.query_embs"].shape == (1, 5, 8)
    assert state["model.input_embeddings.weight"].shape == (3, 10)
    assert state["model.visual_embeddings.weight"].shape == (2 * 10, 6)
    assert state["model.visual_fc.weight"].shape == (4, 6)
    assert state["model.ret_text_hidden_fcs.0.model.weight"].shape == (4, 10)
    assert state["model.gen_text_hidden_fcs.0.model.weight"].shape == (7, 8)
    assert state["model.gen_text_hidden_fcs.0.tfm.decoder.layers.1.norm3.bias"].shape == (8,)


def test_missing_extra_and_misshapen_tensors_are_all_named(exported):
    def damage(state):
        del state["model.logit_scale"]
        state["model.surprise"] = torch.zeros(3)
        state["model.visual_fc.bias"] = torch.zeros(5)

    edit(exported, damage)
    with pytest.raises(UpstreamError) as refusal:
        import_heads(exported)
    message = str(refusal.value)
    assert "missing model.logit_scale []" in message
    assert "unknown model.surprise [3]" in message
    assert "model.visual_fc.bias has shape [5], expected [4]" in message


def test_a_missing_tensor_that_carries_a_size_is_named(exported):
    edit(exported, lambda state: state.pop("model.visual_fc.weight"))
    with pytest.raises(UpstreamError, match=r"missing model\.visual_fc\.weight"):
        import_heads(exported)


def test_tensors_that_contradict_the_arguments_are_refused(exported):
    path = exported / ARGUMENTS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_visual_tokens": 3}))
    with pytest.raises(UpstreamError, match=r"visual_embeddings\.weight has shape \[20, 6\]"):
        import_heads(exported)


def test_unknown_and_unsupported_arguments_are_named(exported):
    path = exported / ARGUMENTS_FILE
    arguments = json.loads(path.read_text()) | {"text_fc_mode": "linear", "colour": "red"}
    del arguments["num_tokens"]
    path.write_text(json.dumps(arguments))
    with pytest.raises(UpstreamError) as refusal:
        read_arguments(exported)
    assert all(key in str(refusal.value) for key in ("text_fc_mode", "colour", "num_tokens"))


def test_a_file_that_would_execute_code_is_refused(exported, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Payload()}, exported / HEADS_FILE)
    with pytest.raises(UpstreamError, match="not an archive of tensors alone"):
        import_heads(exported)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not an archive"])
def test_a_broken_file_is_refused(exported, content):
    (exported / HEADS_FILE).write_bytes(content)
    with pytest.raises(UpstreamError, match=HEADS_FILE):
        import_heads(exported)


def test_heads_that_the_format_cannot_hold_are_refused(tmp_path):
    sizes = SIZES.model_copy(
        update={"mapper": MapperSizes(kind="mlp"), "L": 6, "standardizes_states": True}
    )
    arguments = released_arguments(
        SIZES, language_model="lm", visual_encoder="clip", num_tokens=600
    )
    with pytest.raises(UpstreamError) as refusal:
        export_heads(Heads(sizes), arguments, tmp_path)
    assert "not mlp" in str(refusal.value)
    assert "reads hidden state + embedding, these heads the hidden state" in str(refusal.value)
    assert "read the hidden states as they are" in str(refusal.value)
    assert "num_clip_tokens is 5 in the arguments and 6 in the heads" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_the_released_arguments_and_decision_model(shared_data, tmp_path):
    folder = shared_data / "gill_released"
    arguments = read_arguments(folder)
    paper = HeadSizes(d=1024, e=4096)
    assert arguments == released_arguments(
        paper,
        language_model="facebook/opt-6.7b",
        visual_encoder="openai/clip-vit-large-patch14",
        num_tokens=50265,
    )
    weight, bias = import_decision(folder)
    assert weight.shape == (2, 4096)
    # The two rows of a trained two-way classifier point in opposite directions.
    assert torch.cosine_similarity(*weight, dim=0) < -0.5
    export_decision(weight, bias, tmp_path)
    again = torch.load(tmp_path / DECISION_FILE, weights_only=True)["state_dict"]
    released = torch.load(folder / DECISION_FILE, weights_only=True, map_location="cpu")
    assert again.keys() == released["state_dict"].keys() == {"1.weight", "1.bias"}
    assert all(torch.equal(again[name], t) for name, t in released["state_dict"].items())


def test_a_decision_model_of_another_layout_is_refused(tmp_path):
    torch.save({"state_dict": nn.Linear(4, 3).state_dict()}, tmp_path / DECISION_FILE)
    with pytest.raises(UpstreamError, match=r"missing 1\.weight.*unknown bias"):
        import_decision(tmp_path)
