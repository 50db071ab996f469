"""The stages still compute the numbers that they computed: a refactor, or a library, that moves one
is caught. `python tests/test_golden_miniature.py` writes the golden file anew, on purpose.

A few values per stage, on a world of 60 pictures with the shipped models, in float32 on a CPU:
pooled vectors, target rows, the losses of the first three steps, index vectors, one picture.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

GOLDEN = Path(__file__).parent / "golden" / "miniature.npz"
ROOT = Path(__file__).parents[1]
CHANGES = {
    "captions": {
        "table": "miniature",
        "miniature": {
            "pictures": 60,
            "held_out_pictures": 10,
            "stories": 2,
            "dialogues": 2,
            "prompts": 4,
        },
    },
    "objective": {"retrieval_weight": 1.0},
    "training": {"steps": 3, "batch_size": 16, "learning_rate": 2e-3, "validate_every": 3},
    "run": {"device": "cpu", "threads": 1, "log_every": 1},
}
STAGES = (
    *("prepare-captions", "prepare-backbones", "precompute-features", "precompute-targets"),
    *("train", "build-index"),
)


def compute() -> dict[str, np.ndarray]:
    """The numbers, by running the stages in a folder of their own."""
    from cache import read_rows
    from gill import Gill
    from stages.cli import app

    params = yaml.safe_load((ROOT / "presets" / "miniature.yaml").read_text(encoding="utf-8"))
    for section, values in CHANGES.items():
        params[section] = {**params[section], **values}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        for stage in STAGES:
            result = CliRunner().invoke(app, [stage])
            assert result.exit_code == 0, f"{stage}: {result.output}"
        gill = Gill.load("artifacts", device="cpu")
        assert gill.index is not None
        queries = np.eye(4, gill.index.width, dtype=np.float32)
        import torch

        found = gill.index.search(torch.from_numpy(queries), 3)
        reply = gill.reply(
            ["in the desert on the left a small red ring."], want="generate", steps=4, seed=0
        )
        curves = Path("metrics/train/plots/metrics/train")
        return {
            "features": read_rows("artifacts/features.zarr", [0, 1, 50])["pooled"],
            "targets": read_rows("artifacts/targets.zarr", [0, 70])["embedding"].astype(np.float32),
            **{
                f"loss_{name}": np.loadtxt(curves / f"{name}.tsv", skiprows=1, delimiter="\t")[
                    :, -1
                ]
                for name in ("loss", "captioning", "generation", "text_to_image")
            },
            "index_scores": np.array([[hit.score for hit in row] for row in found], np.float32),
            "picture": np.asarray(reply.images[0].picture, np.float32),
        }


# Rounding differs between processors and builds; a changed formula moves far more than this.
TOLERANCES = {
    "features": {"rtol": 1e-3, "atol": 1e-3},
    "targets": {"rtol": 2e-3, "atol": 2e-3},  # stored in float16
    "index_scores": {"rtol": 2e-3, "atol": 2e-3},
    "picture": {"rtol": 0.0, "atol": 4.0},  # of 255
}


@pytest.fixture(scope="module")
def computed() -> dict[str, np.ndarray]:
    return compute()


@pytest.mark.parametrize("name", sorted(np.load(GOLDEN).files) if GOLDEN.exists() else [])
def test_the_stages_compute_what_they_computed(computed: dict[str, np.ndarray], name: str) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        expected = golden[name]
    tolerance = TOLERANCES.get(name, {"rtol": 1e-3, "atol": 1e-4})
    np.testing.assert_allclose(computed[name], expected, **tolerance)


def test_there_is_a_golden_file() -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        assert {"features", "targets", "loss_loss", "index_scores", "picture"} <= set(golden.files)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    np.savez_compressed(GOLDEN, **compute())  # type: ignore[arg-type]
    sys.exit(f"{GOLDEN} written")
