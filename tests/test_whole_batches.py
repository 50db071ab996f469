"""On a GPU every batch of precomputing has one size: what fills one up leaves no trace."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cache import Codec, Roles
from miniature.backbones import SHIPPED
from pipeline import devices
from pipeline.devices import filled_up
from pipeline.frozen.latent_encoder import LatentEncoder
from pipeline.frozen.text_conditioner import TextConditioner
from pipeline.frozen.visual_encoder import VisualEncoder
from settings.params import BatchSizes, RunParams
from stages import feature_store, latent_store, target_store

RUN = RunParams(device="cpu", threads=1, batch_sizes=BatchSizes(features=4, targets=4, pictures=4))


def backbone(path: object) -> SimpleNamespace:
    return SimpleNamespace(path=str(path), torch_dtype=torch.float32)


def features() -> Roles:
    encoder = backbone(f"local-dir:{SHIPPED.visual_encoder}")
    return feature_store.make_roles(encoder, RUN)  # type: ignore[arg-type]


def latents() -> Roles:
    return latent_store.make_roles(backbone(SHIPPED.image_generator), RUN)  # type: ignore[arg-type]


def targets() -> Roles:
    generator = backbone(SHIPPED.image_generator)
    return target_store.make_roles(generator, RUN, Codec())  # type: ignore[arg-type]


def pictures(folder) -> list[SimpleNamespace]:
    random, rows = np.random.default_rng(0), []
    for i in range(3):
        path = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8)).save(path)
        rows.append(SimpleNamespace(value=str(path)))
    return rows


def captions(folder) -> list[SimpleNamespace]:
    return [SimpleNamespace(value=f"a {shape} ring") for shape in ("red", "small red", "blue")]


@pytest.mark.parametrize(
    ("make", "rows", "model", "method"),
    [
        (features, pictures, VisualEncoder, "pooled_of"),
        (latents, pictures, LatentEncoder, "encode"),
        (targets, captions, TextConditioner, "encode"),
    ],
)
def test_a_small_batch_is_filled_up_and_its_rows_are_what_they_were(
    monkeypatch, tmp_path, make, rows, model, method
):
    sizes, work = [], getattr(model, method)

    def counted(self, batch):
        sizes.append(len(batch))
        return work(self, batch)

    monkeypatch.setattr(model, method, counted)
    roles = make()
    payloads = [roles.read(row) for row in rows(tmp_path)]
    assert len(payloads) == 3
    sizes.clear()
    plain = roles.encode(payloads)
    monkeypatch.setattr(devices, "SHAPES_COST", ("cpu",))
    whole = roles.encode(payloads)
    assert sizes == [3, 4]
    assert plain.keys() == whole.keys()
    for name, values in plain.items():
        assert np.asarray(whole[name]).shape == np.asarray(values).shape
        np.testing.assert_allclose(
            np.asarray(whole[name]), np.asarray(values), rtol=1e-4, atol=1e-5
        )


def test_a_whole_batch_is_itself_and_only_on_a_gpu_is_one_made():
    assert filled_up("abc", 5, torch.device("cpu")) == ["a", "b", "c"]
    assert filled_up("abc", 5, torch.device("cuda")) == ["a", "b", "c", "c", "c"]
    assert filled_up("abc", 3, torch.device("cuda")) == ["a", "b", "c"]
