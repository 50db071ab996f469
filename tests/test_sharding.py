"""Two processes: a sharded language model and micro-batches give the step of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from pipeline.bridge.batch import take_examples
from pipeline.bridge.heads import Heads
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import draw_packing
from pipeline.frozen.backbones import BackboneError
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.distribution import processes
from pipeline.training.sharding import ShardingError, load_sharded_language_model
from pipeline.training.stepping import Stepper
from tests.test_accumulation import build, example_batch
from tests.tiny_language_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
MODELS = ("opt", "llama-untied-grouped")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
BATCH = 12
PRESETS = {
    "paper": Objective.paper(),
    "released": Objective.released(),
    "drawn apart": Objective(separate_image_draws=True, token_reduction="tokens"),
}


def one_step(
    objective: Objective,
    dtype: torch.dtype,
    language_model: LanguageModel | None = None,
    name: str = "opt",
    **settings: object,
) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step of 12 examples, this process's share of them."""
    gill = build(objective, dtype, name)
    if language_model is not None:
        heads = Heads(gill.heads.sizes).to(dtype)
        heads.load_state_dict(gill.heads.state_dict())
        gill = MultimodalLanguageModel(language_model, heads)
    stepper = Stepper(gill, objective, TrainingSettings(batch_size=BATCH, **settings))
    gill.heads.to(dtype)
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = (BATCH // count * rank, BATCH // count * (rank + 1))
    draws = draw_packing(BATCH, objective, torch.Generator().manual_seed(4))
    stepper.take(1, take_examples(example_batch(BATCH, dtype), *own), draws.part(*own))
    gradients = {n: p.grad for n, p in gill.heads.named_parameters() if p.grad is not None}
    return {"loss": torch.tensor(stepper.settle()["loss"]), **gradients}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of `child_main` leave behind."""
    folder = tmp_path_factory.mktemp("two")
    for dtype in TOLERANCE:
        for name in MODELS:
            place = folder / f"{name}-{dtype}"
            tiny_model(name, dtype).save_pretrained(place)
            tiny_tokenizer().save_pretrained(place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "2",
                 "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [child.wait(timeout=600) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder


def assert_step(found: Path, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    ours = load_file(found)
    assert ours.keys() == expected.keys()
    overall = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, value in expected.items():
        error = (ours[name] - value).norm() / torch.maximum(value.norm(), 1e-3 * overall)
        # The loss itself is reported in float32.
        allowed = max(tolerance, 1e-6) if name == "loss" else tolerance
        assert float(error) < allowed, name


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_on_two_processes_give_the_step_of_one(folder: Path, preset: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        expected = one_step(PRESETS[preset], dtype)
        for rank in range(2):
            found = folder / f"micro-{preset}-{dtype}-{rank}.safetensors"
            assert_step(found, expected, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_language_model_gives_the_step_of_the_whole_one(folder: Path, name: str) -> None:
    for preset in ("paper", "released"):
        for dtype, tolerance in TOLERANCE.items():
            expected = one_step(PRESETS[preset], dtype, name=name)
            for kind in ("whole", "parted"):
                for rank in range(2):
                    found = folder / f"sharded-{name}-{preset}-{kind}-{dtype}-{rank}.safetensors"
                    assert_step(found, expected, tolerance)


def test_sharding_needs_several_processes_and_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ShardingError, match="only one: start with torchrun"):
        load_sharded_language_model(tmp_path)
    objective = PRESETS["paper"]
    with pytest.raises(ValueError, match="shard_language_model is True, but .* loaded whole"):
        Stepper(
            build(objective, torch.float32), objective, TrainingSettings(shard_language_model=True)
        )


def child_main(folder: Path) -> None:
    """One of two processes."""
    with processes() as rank:
        for dtype in TOLERANCE:
            for preset, objective in PRESETS.items():
                step = one_step(objective, dtype, micro_batch_size=4)  # of 6: 4 and 2
                save_file(step, folder / f"micro-{preset}-{dtype}-{rank}.safetensors")
            for name in MODELS:
                sharded_steps(folder, name, dtype, rank)
        with pytest.raises(BackboneError, match="cannot load the language model"):
            load_sharded_language_model(folder / "absent")  # in both processes


def sharded_steps(folder: Path, name: str, dtype: torch.dtype, rank: int) -> None:
    place = folder / f"{name}-{dtype}"
    language_model = load_sharded_language_model(place if rank == 0 else "nowhere", dtype)
    parameters = dict(language_model.model.named_parameters())
    shares = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
    assert shares.keys() == {n for n in parameters if ".layers." in n}
    for share in shares.values():
        assert share.to_local().numel() == share.numel() // 2
    kinds = {"whole": {}, "parted": {"micro_batch_size": 4, "recompute_activations": True}}
    for preset in ("paper", "released"):
        for kind, settings in kinds.items():
            step = one_step(
                PRESETS[preset],
                dtype,
                language_model,
                name,
                shard_language_model=True,
                **settings,
            )
            save_file(step, folder / f"sharded-{name}-{preset}-{kind}-{dtype}-{rank}.safetensors")
    # Between the passes each process holds its shares alone.
    assert all(isinstance(parameters[n], DTensor) for n in shares)
    apart = PRESETS["drawn apart"]
    both = {"shard_language_model": True, "fuse_layers": True}
    with pytest.raises(ValueError, match="run.fuse_layers .* turn one of them off"):
        one_step(PRESETS["paper"], dtype, language_model, name, **both)
    with pytest.raises(ValueError, match="separate_image_draws"):
        one_step(apart, dtype, language_model, name, shard_language_model=True)


if __name__ == "__main__":
    child_main(Path(sys.argv[1]))
