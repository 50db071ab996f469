"""Losses and gradients of the released code, computed outside (tests/golden/*/README.md).

`GILL_GOLDEN` names other folders of the same layout, separated by `:`. Every size is read from the
folder: nothing here knows the shapes of one in particular.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, training_losses
from pipeline.bridge.upstream import import_heads, released_name
from pipeline.frozen.language_model import LanguageModel, load_language_model
from pipeline.settings import Objective

FOLDERS = [
    Path(folder)
    for folder in os.environ.get("GILL_GOLDEN", str(Path(__file__).parent / "golden" / "a")).split(
        ":"
    )
    if folder
]

# What each mode of the released code adds to the loss: its own parts with their own weights.
MODES = {
    "captioning": {"image_token_weight": 0, "retrieval_weight": 0, "generation_weight": 0},
    "retrieval": {"captioning_weight": 0, "image_token_weight": 0.5, "generation_weight": 0},
    "generation": {"captioning_weight": 0, "image_token_weight": 0.5, "retrieval_weight": 0},
}
PARTS = {
    "captioning.loss.ce": "captioning",
    "retrieval.loss.ce": "image_token",
    "generation.loss.ce": "image_token",
    "retrieval.loss.nce_text": "text_to_image",
    "retrieval.loss.nce_image": "image_to_text",
    "generation.loss.l2": "generation",
    "loss.total": "total",
}


class Golden:
    """One folder: our model around its weights, its batch, its arrays."""

    def __init__(self, folder: Path) -> None:
        arrays = safe_open(folder / "golden.safetensors", "pt")
        self.names = set(arrays.keys())
        self.array = arrays.get_tensor
        meta = json.loads((folder / "meta.json").read_text())
        heads, arguments = import_heads(folder)
        self.image_ids = meta["img_token_ids"]
        language_model = load_language_model(folder / arguments.opt_version)
        if language_model.num_rows < self.image_ids[0]:
            language_model = with_image_row(language_model, self.array("embedding_full"))
        self.gill = MultimodalLanguageModel(language_model, heads)
        r = heads.sizes.r
        captions = [
            row[len(language_model.start_ids) : int(length) - r].tolist()
            for row, length in zip(self.array("in.tokens"), self.array("in.caption_len"))
        ]
        self.batch = CaptionBatch.from_lists(
            captions,
            self.array("feat.clip_pooled"),
            self.array("in.clip_emb"),
            torch.arange(len(captions)),
            max_tokens=self.array("in.tokens").shape[1],
        )

    def gradient(self, prefix: str, name: str) -> Tensor | None:
        key = prefix + released_name(name) + ("[IMG]" if name == "image_embeddings" else "")
        return self.array(key) if key in self.names else None


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def with_image_row(language_model: LanguageModel, table: Tensor) -> LanguageModel:
    """The released code's row `<|image|>`, for a table on disk that has no row to spare for it."""
    num_rows = language_model.num_rows + 1
    language_model.model.resize_token_embeddings(num_rows, mean_resizing=False)
    language_model.input_rows.copy_(table[:num_rows])
    return LanguageModel(language_model.model, language_model.tokenizer, num_rows)


def check_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Relative L2 of 1e-4; a gradient that is zero but for rounding counts against all of them."""
    floor = 1e-4 * torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, expected in theirs.items():
        error = (ours[name] - expected.view_as(ours[name])).norm()
        assert error <= 1e-4 * torch.maximum(expected.norm(), floor), name
    for name in ours.keys() - theirs.keys():
        assert ours[name].norm() <= 1e-4 * floor, name


def test_image_ids_follow_the_frozen_rows(golden: Golden) -> None:
    language_model = golden.gill.language_model
    assert language_model.num_rows == golden.image_ids[0]
    table = golden.array("embedding_full")[: language_model.num_rows]
    assert language_model.input_rows[: language_model.num_rows].equal(table)


@pytest.mark.parametrize("packed", [False, True])
def test_losses_and_gradients_of_a_step(golden: Golden, packed: bool) -> None:
    draws = PackingDraws.same(len(golden.batch), packed)
    losses = training_losses(golden.gill, golden.batch, Objective.released(), draws)
    for array, part in PARTS.items():
        expected = float(golden.array(f"concat{int(packed)}.{array}"))
        assert float(getattr(losses, part).detach()) == pytest.approx(expected, rel=1e-5), array
    golden.gill.zero_grad()
    losses.total.backward()
    ours, theirs = {}, {}
    for name, parameter in golden.gill.heads.named_parameters():
        assert parameter.grad is not None
        ours[name] = parameter.grad
        mode = "generation." if name.startswith("mapper.") else ""
        expected = golden.gradient(f"concat{int(packed)}.{mode}grad.", name)
        if expected is not None:
            theirs[name] = expected
    assert len(theirs) == len(ours)
    check_gradients(ours, theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_of_each_mode(golden: Golden, mode: str, packed: bool) -> None:
    objective = Objective.released().model_copy(update=MODES[mode])
    draws = PackingDraws.same(len(golden.batch), packed)
    losses = training_losses(golden.gill, golden.batch, objective, draws)
    prefix = f"concat{int(packed)}.{mode}."
    expected_loss = float(golden.array(prefix + "loss.mode_total"))
    assert float(losses.total.detach()) == pytest.approx(expected_loss, rel=1e-5)
    golden.gill.zero_grad()
    losses.total.backward()
    parameters = dict(golden.gill.heads.named_parameters())
    ours = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    theirs = {n: golden.gradient(prefix + "grad.", n) for n in parameters}
    check_gradients(ours, {n: g for n, g in theirs.items() if g is not None})


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_and_outputs(golden: Golden, packed: bool) -> None:
    gill, batch, prefix = golden.gill, golden.batch, f"concat{int(packed)}."
    rows = [(i, i + 1) for i in range(0, len(batch), 2)]
    if not packed:
        rows = [(i,) for i in range(len(batch))]
    with torch.no_grad():
        hidden = gill.image_tokens(batch, rows, True, False).hidden
        pairs = {
            prefix + "generation.img_hidden": hidden,
            prefix + "retrieval.img_hidden": hidden,
            prefix + "generation.out": gill.generation_embedding(hidden),
            prefix + "retrieval.text_emb": gill.text_query(hidden),
            prefix + "retrieval.image_emb_scaled": gill.image_key(batch.pooled)
            * gill.heads.logit_scale.exp(),
            "feat.visual_tokens": gill.visual_prefix(batch.pooled),
        }
    for array, ours in pairs.items():
        torch.testing.assert_close(ours, golden.array(array), rtol=1e-4, atol=1e-5)
