"""Training: schedule, optimiser, validation, resuming bit by bit, several processes, bad data."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.bridge.batch import CaptionBatch, take_examples
from pipeline.bridge.checkpoint import BEST, LAST, STATE, CheckpointError, load_heads, read_record
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, draw_packing, training_losses
from pipeline.devices import Arriving
from pipeline.frozen.language_model import LanguageModel
from pipeline.settings import (
    Constant,
    LinearDecay,
    MapperSizes,
    Objective,
    StepDecay,
    TrainingSettings,
)
from pipeline.training.accumulation import backpropagate
from pipeline.training.distribution import processes
from pipeline.training.loop import NonFiniteLossError, train
from pipeline.training.progress import DvcliveLog, TrainingProgress
from pipeline.training.stepping import NonFiniteStepError, Stepper
from pipeline.training.validation import validate
from tests.tiny_language_models import NUM_WORDS, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
SIZES = {"d": 6, "k": 2, "r": 3, "L": 4, "D": 5, "m": 8, "p": 4}
OBJECTIVES = {"paper": Objective.paper(), "released": Objective.released()}
SETTINGS = TrainingSettings(
    steps=8,
    batch_size=4,
    learning_rate=0.01,
    image_token_rate=0.3,
    warmup_steps=2,
    clip_norm=1.0,
    log_every=1,
    validate_every=3,
    checkpoint_every=2,
    seed=5,
)


def tiny_gill(
    dtype: torch.dtype = torch.float32, objective: Objective = OBJECTIVES["released"]
) -> MultimodalLanguageModel:
    language_model = LanguageModel(tiny_model("opt", dtype), tiny_tokenizer())
    mapper = MapperSizes(
        encoder_layers=1, decoder_layers=1, adds_embedding=objective == Objective.released()
    )
    torch.manual_seed(1)
    return MultimodalLanguageModel(
        language_model, Heads(HeadSizes(e=language_model.width, mapper=mapper, **SIZES))
    )


def random_batch(seed: int, size: int = 4) -> CaptionBatch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (size,), generator=g).tolist()
    return CaptionBatch.from_lists(
        [torch.randint(3, NUM_WORDS, (n,), generator=g).tolist() for n in lengths],
        torch.randn(size, SIZES["d"], generator=g),
        torch.randn(size, SIZES["L"], SIZES["D"], generator=g),
        torch.arange(size) + 100 * seed,
        max_tokens=99,
    )


class RandomBatches:
    """Batch i is made from seed i; optionally slow, poisoned, or one process's part."""

    def __init__(
        self, size: int = 4, rank: int = 0, processes: int = 1, seconds: float = 0
    ) -> None:
        self.size, self.rank, self.processes, self.seconds = size, rank, processes, seconds
        self.position = 0

    def __iter__(self):
        while True:
            time.sleep(self.seconds)
            self.position += 1
            yield self.part(self.whole(self.position))

    def whole(self, position: int) -> CaptionBatch:
        return random_batch(position, self.size)

    def part(self, batch: CaptionBatch) -> CaptionBatch:
        share = self.size // self.processes
        return take_examples(batch, share * self.rank, share * (self.rank + 1))

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


HELD_OUT = [random_batch(900, 6), random_batch(901, 3)]


def run(
    directory: Path,
    settings: TrainingSettings = SETTINGS,
    gill: MultimodalLanguageModel | None = None,
    **kwargs,
):
    kwargs = {"batches": RandomBatches(), "objective": Objective.released()} | kwargs
    return train(
        gill or tiny_gill(), settings=settings, directory=directory, validation=HELD_OUT, **kwargs
    )


# --- one step ------------------------------------------------------------------------------------


def test_the_rate_warms_up_from_zero_and_decays_as_told():
    def rates(**kwargs) -> list[float]:
        settings = TrainingSettings(learning_rate=1.0, **kwargs)
        return [settings.rate(step) for step in range(settings.steps)]

    assert rates(steps=4, warmup_steps=2, schedule=Constant()) == [0, 0.5, 1, 1]
    assert rates(steps=8, schedule=LinearDecay(begin=0.5)) == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(steps=5, schedule=StepDecay(at=3, to=0.1)) == [1, 1, 1, 0.1, 0.1]
    released = TrainingSettings.released()
    at = [0, 1, 2000, 12007, 12008, 19999]
    assert [released.rate(step) for step in at] == pytest.approx([0, 5e-7, 1e-3, 1e-3, 1e-4, 1e-4])


def test_without_decay_a_step_is_plain_adam():
    gill, twin = (tiny_gill(objective=OBJECTIVES["paper"]) for _ in range(2))
    settings = TrainingSettings(steps=3, schedule=Constant(), learning_rate=0.01)
    stepper = Stepper(gill, Objective.paper(), settings)
    adam = torch.optim.Adam(twin.heads.parameters(), lr=0.01, betas=(0.9, 0.95))
    for step in range(3):
        batch, draws = random_batch(step), PackingDraws.same(4, packed=False)
        stepper.take(step, batch, draws)
        adam.zero_grad()
        training_losses(twin, batch, Objective.paper(), draws).total.backward()
        adam.step()
    for name, tensor in twin.heads.state_dict().items():
        if name.endswith("in_proj_bias"):
            continue  # a third of it has no gradient but rounding, which Adam makes large
        torch.testing.assert_close(gill.heads.state_dict()[name], tensor)


def test_image_tokens_learn_at_a_rate_of_their_own():
    def after_a_step(rate: float) -> dict[str, torch.Tensor]:
        gill = tiny_gill(objective=OBJECTIVES["paper"])
        settings = TrainingSettings(schedule=Constant(), image_token_rate=rate)
        stepper = Stepper(gill, Objective.paper(), settings)
        stepper.take(0, random_batch(1), PackingDraws.same(4, packed=False))
        return gill.heads.state_dict()

    start = tiny_gill(objective=OBJECTIVES["paper"]).heads.image_embeddings.detach()
    whole, tenth = after_a_step(1.0), after_a_step(0.1)
    moved, moved_less = (heads.pop("image_embeddings") - start for heads in (whole, tenth))
    assert float(moved.abs().max()) == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(moved_less, 0.1 * moved, rtol=1e-3, atol=1e-7)
    assert all(torch.equal(tensor, tenth[name]) for name, tensor in whole.items())


def test_clipping_and_rescaling():
    gill = tiny_gill()
    settings = TrainingSettings(schedule=Constant(), clip_norm=0.01)
    stepper = Stepper(gill, Objective.released(), settings)
    stepper.take(0, random_batch(1), PackingDraws.same(4, packed=True))
    norms = torch.stack([p.grad.norm() for p in gill.heads.parameters()])
    assert stepper.settle()["gradient_norm"] > 0.1
    assert float(norms.norm()) == pytest.approx(0.01, rel=1e-4)
    rows = gill.heads.image_embeddings.norm(dim=1)
    expected = gill.language_model.input_rows[: gill.language_model.num_rows].norm(dim=1).mean()
    torch.testing.assert_close(rows, expected.expand(3))


def test_the_trained_dtype_is_the_objectives():
    gill = tiny_gill(torch.bfloat16)
    low = Objective.released().model_copy(update={"trained_dtype": "bfloat16"})
    Stepper(gill, low, SETTINGS)
    assert {p.dtype for p in gill.heads.parameters()} == {torch.bfloat16}
    stepper = Stepper(gill, Objective.released(), SETTINGS)
    stepper.take(1, random_batch(1), PackingDraws.same(4, packed=False))
    assert {p.dtype for p in gill.heads.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in stepper.optimizer.state.values()} == {torch.float32}
    assert math.isfinite(stepper.settle()["loss"])


# --- a whole run ---------------------------------------------------------------------------------


def test_a_run_learns_logs_and_leaves_its_files(tmp_path):
    gill, progress, logged = tiny_gill(), [], []
    frozen = {name: p.clone() for name, p in gill.language_model.model.named_parameters()}
    settings = SETTINGS.model_copy(update={"steps": 60, "validate_every": 20, "log_every": 5})

    class OneBatch(RandomBatches):
        def whole(self, position: int) -> CaptionBatch:
            return random_batch(1)

    result = run(
        tmp_path, settings, gill, batches=OneBatch(seconds=0.001), log=logged.append,
        on_progress=progress.append, backbones={"language_model": "f" * 64},
        parameters={"model": {"k": 2}},
    )  # fmt: skip
    losses = [row["train/loss"] for row in result.curve if "train/loss" in row]
    assert len(losses) == 12
    assert losses[-1] < 0.75 * losses[0]
    assert logged == result.curve
    assert [row["step"] for row in result.curve if "validation/loss" in row] == [20, 40, 60]
    for name, parameter in gill.language_model.model.named_parameters():
        assert torch.equal(parameter, frozen[name])

    last, record = load_heads(tmp_path / LAST, sizes=gill.heads.sizes)
    assert all(torch.equal(t, gill.heads.state_dict()[n]) for n, t in last.state_dict().items())
    assert (record.step, record.backbones) == (60, {"language_model": "f" * 64})
    assert record.parameters["training"]["steps"] == 60
    assert record.parameters["model"] == {"k": 2}
    best = read_record(tmp_path / BEST)
    ranks = {row["step"]: (row["validation/text_to_image_r1"], -row["validation/loss"])
             for row in result.curve if "validation/loss" in row}  # fmt: skip
    assert best.step == result.best_step == max(ranks, key=ranks.__getitem__)
    assert best.metrics["validation/text_to_image_r1"] == max(ranks.values())[0]

    shown = progress[-1]
    assert isinstance(shown, TrainingProgress)
    assert (shown.step, shown.seconds_left) == (60, 0)
    assert 0 < shown.waiting < 1
    words = random_batch(1).offsets[-1] / 4
    assert shown.tokens_per_second / shown.examples_per_second == pytest.approx(float(words))
    assert "loss " in str(shown)
    assert "ETA 0:00:00" in str(shown)


def test_validation_is_over_all_rows_at_once():
    gill, objective = tiny_gill(torch.float64), Objective.released()
    gill.heads.double()
    batches = [replace(b, pooled=b.pooled.double(), targets=b.targets.double()) for b in HELD_OUT]
    metrics = validate(gill, batches, objective)
    lists = [b.tokens[x:y].tolist() for b in batches for x, y in zip(b.offsets, b.offsets[1:])]
    whole = CaptionBatch.from_lists(
        lists,
        torch.cat([b.pooled for b in batches]),
        torch.cat([b.targets for b in batches]),
        torch.cat([b.rows for b in batches]),
        max_tokens=99,
    )
    # Means over examples are the same in one batch; means over tokens are not.
    objective = objective.model_copy(update={"token_reduction": "examples"})
    metrics = validate(gill, batches, objective)
    losses = training_losses(gill, whole, objective, PackingDraws.same(9, packed=False))
    assert metrics["loss"] == pytest.approx(float(losses.total.detach()))
    for part in ("captioning", "image_token", "text_to_image", "image_to_text", "generation"):
        assert metrics[part] == pytest.approx(float(getattr(losses, part).detach())), part

    contexts = [[torch.tensor([2, *ids])] for ids in lists]
    queries, keys = gill.text_query(gill.image_hidden(contexts)), gill.image_key(whole.pooled)
    ranked = (queries @ keys.T).argsort(dim=1, descending=True)
    hits = sum(int(row[0]) == i for i, row in enumerate(ranked))
    assert metrics["text_to_image_r1"] == pytest.approx(hits / 9)
    ranked = (keys @ queries.T).argsort(dim=1, descending=True)
    hits = sum(int(row[0]) == i for i, row in enumerate(ranked))
    assert metrics["image_to_text_r1"] == pytest.approx(hits / 9)


def test_any_picture_of_the_same_content_is_a_hit():
    gill, objective = tiny_gill(objective=OBJECTIVES["paper"]), Objective.paper()
    distinct = validate(gill, HELD_OUT, objective, torch.arange(9))
    assert distinct == validate(gill, HELD_OUT, objective)
    assert distinct["text_to_image_r1"] < 1
    same = validate(gill, HELD_OUT, objective, torch.zeros(9, dtype=torch.int64))
    assert same["text_to_image_r1"] == same["image_to_text_r1"] == 1
    assert same["text_to_image"] == distinct["text_to_image"]


@pytest.mark.parametrize("repository", ["none", "without a commit"])
def test_dvclive_writes_its_files_and_nothing_else(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    if repository != "none":
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    for _ in range(2):  # a resumed run logs everything again
        with DvcliveLog(tmp_path / "live") as log:
            log({"step": 10, "train/loss": 2.5})
            log({"step": 20, "train/loss": 1.5})
            log({"step": 20, "validation/loss": 3.0})
    table = (tmp_path / "live/plots/metrics/train/loss.tsv").read_text().split()
    assert table == ["step", "loss", "10", "2.5", "20", "1.5"]
    metrics = json.loads((tmp_path / "live/metrics.json").read_text())
    assert metrics == {"train": {"loss": 1.5}, "validation": {"loss": 3.0}, "step": 20}
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["dvc.yaml", "live"]
    assert (tmp_path / "dvc.yaml").read_text() == "stages: {}\n"
    assert not list((tmp_path / "live").rglob("dvc.yaml"))


# --- resuming ------------------------------------------------------------------------------------


def saved_step(directory: Path) -> int:
    path = directory / STATE
    return read_record(path).step if path.exists() else 0


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (LAST, BEST, STATE))


def test_a_killed_run_resumes_bit_by_bit(tmp_path):
    whole = run(tmp_path / "whole")
    child = subprocess.Popen(
        [sys.executable, __file__, "until killed", str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 120
        while saved_step(tmp_path / "killed") != 4 and time.monotonic() < deadline:
            assert child.poll() is None, "the run ended by itself"
            time.sleep(0.01)
    finally:
        child.kill()
    assert child.wait() == -signal.SIGKILL
    assert saved_step(tmp_path / "killed") == 4
    logged = []
    resumed = run(tmp_path / "killed", resume=True, log=logged.append)
    assert resumed.curve == whole.curve == logged
    assert same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_an_interruption_at_any_step_changes_nothing(tmp_path, stop):
    class Interrupted(RandomBatches):
        def whole(self, position: int) -> CaptionBatch:
            if position == stop + 1:
                raise KeyboardInterrupt
            return super().whole(position)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batches=Interrupted())
    resumed = run(tmp_path / "cut", resume=True)
    assert resumed.curve == whole.curve
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_resuming_something_else_is_refused(tmp_path):
    run(tmp_path)
    before = (tmp_path / STATE).read_bytes()
    other = SETTINGS.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(CheckpointError, match=r"training\.learning_rate is 0\.01 .* 0\.5 here"):
        run(tmp_path, other, resume=True)
    with pytest.raises(CheckpointError, match="the language model is another one"):
        run(tmp_path, resume=True, backbones={"language_model": "other"})
    assert (tmp_path / STATE).read_bytes() == before


# --- bad data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["pooled", "targets"])
def test_a_loss_that_is_not_finite_names_its_row_and_keeps_the_last_state(tmp_path, field):
    class Poisoned(RandomBatches):
        def whole(self, position: int) -> CaptionBatch:
            batch = super().whole(position)
            if position == 6:
                getattr(batch, field)[2] = float("nan")
            return batch

    gill = tiny_gill()
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*rows \[602\]") as stop:
        run(tmp_path, gill=gill, batches=Poisoned())
    assert stop.value.rows == [602]
    assert all(bool(p.isfinite().all()) for p in gill.heads.parameters())
    assert read_record(tmp_path / STATE).step == 4
    assert load_heads(tmp_path / LAST)[1].step == 4


def test_a_bad_step_changes_nothing_and_is_told_when_the_next_one_is_taken():
    batch, draws = random_batch(1), PackingDraws.same(4, packed=False)
    bad = replace(batch, targets=batch.targets * float("inf"))
    gill, twin = tiny_gill(), tiny_gill()
    steppers = [Stepper(one, Objective.released(), SETTINGS) for one in (gill, twin)]
    for stepper in steppers:
        stepper.take(1, batch, draws)
    steppers[0].take(2, bad, draws)
    for name, tensor in twin.heads.state_dict().items():
        assert torch.equal(gill.heads.state_dict()[name], tensor), name
    states = [stepper.optimizer.state_dict()["state"] for stepper in steppers]
    for i, tensors in states[1].items():
        for name, tensor in tensors.items():
            assert torch.equal(states[0][i][name], tensor), name
    with pytest.raises(NonFiniteStepError) as stop:
        steppers[0].take(3, batch, draws)
    assert stop.value.step == 2
    assert stop.value.batch is bad
    assert math.isnan(stop.value.values["loss"]) or math.isinf(stop.value.values["loss"])
    assert torch.equal(gill.heads.logit_scale, twin.heads.logit_scale)


def test_a_step_waits_for_the_one_before_alone_when_it_has_given_the_device_its_own(monkeypatch):
    told = []

    class Told(Arriving):
        def __init__(self, tensor):
            super().__init__(tensor)
            self.number = sum(kind == "sent" for kind, _ in told)
            told.append(("sent", self.number))

        def __array__(self, dtype=None, copy=None):
            told.append(("read", self.number))
            return super().__array__(dtype, copy)

    monkeypatch.setattr("pipeline.training.stepping.Arriving", Told)
    gill, draws = tiny_gill(), PackingDraws.same(4, packed=False)
    stepper = Stepper(gill, Objective.released(), SETTINGS)
    monkeypatch.setattr(
        "pipeline.training.stepping.backpropagate",
        lambda *args: [told.append(("given", None)), backpropagate(*args)][1],
    )
    for step in range(3):
        stepper.take(step, random_batch(step), draws)
    first, second = ("given", None), ("given", None)
    assert told == [
        *(first, ("sent", 0)),
        *(second, ("read", 0), ("sent", 1)),
        *(second, ("read", 1), ("sent", 2)),
    ]
    assert stepper.settle() is stepper.settle()
    assert told[-1] == ("read", 2)
    assert len(told) == 9


def test_a_bad_step_between_two_looks_stops_the_run_before_anything_is_saved(tmp_path):
    class Poisoned(RandomBatches):
        def whole(self, position: int) -> CaptionBatch:
            batch = super().whole(position)
            if position == 6:
                batch.pooled[1] = float("nan")
            return batch

    seldom = SETTINGS.model_copy(
        update={"log_every": 100, "validate_every": 100, "checkpoint_every": 4}
    )
    gill = tiny_gill()
    with pytest.raises(NonFiniteLossError, match=r"step 5: .*rows \[601\]") as stop:
        run(tmp_path, seldom, gill, batches=Poisoned())
    assert stop.value.step == 5
    assert read_record(tmp_path / STATE).step == load_heads(tmp_path / LAST)[1].step == 4
    assert all(bool(p.isfinite().all()) for p in gill.heads.parameters())


def test_batches_that_end_or_do_not_fit_are_refused(tmp_path):
    class Ending(RandomBatches):
        def __iter__(self):
            yield from [random_batch(1), random_batch(2)]

    with pytest.raises(ValueError, match="ended after step 2 of 8"):
        run(tmp_path, batches=Ending())
    with pytest.raises(ValueError, match="batch_size is 4, but each of 1 processes got 6"):
        run(tmp_path, batches=RandomBatches(size=6))


def test_taking_examples():
    batch = random_batch(3, 5)
    part = take_examples(batch, 1, 4)
    assert part.lengths == batch.lengths[1:4]
    assert part.tokens.tolist() == batch.tokens[batch.offsets[1] : batch.offsets[4]].tolist()
    assert torch.equal(part.targets, batch.targets[1:4])
    assert part.rows.tolist() == [301, 302, 303]


# --- several processes ---------------------------------------------------------------------------


def one_step_gradients(rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Gradients of one step of a global batch of 8, some pairs packed, for both objectives."""
    gradients = {}
    for name, objective in OBJECTIVES.items():
        gill = tiny_gill(torch.float64, objective)
        settings = SETTINGS.model_copy(update={"batch_size": 8, "clip_norm": None})
        stepper = Stepper(gill, objective, settings)
        gill.heads.double()
        batch = random_batch(7, 8)
        batch = replace(batch, pooled=batch.pooled.double(), targets=batch.targets.double())
        share = 8 // num_processes
        draws = draw_packing(8, objective, torch.Generator().manual_seed(2))
        pairs = slice(share // 2 * rank, share // 2 * (rank + 1))
        own = PackingDraws(
            *(list(coins)[pairs] for coins in (draws.captioning, draws.retrieval, draws.generation))
        )
        stepper.take(1, take_examples(batch, share * rank, share * (rank + 1)), own)
        gradients[f"{name}/loss"] = torch.tensor(stepper.settle()["loss"])
        for parameter, value in gill.heads.named_parameters():
            gradients[f"{name}/{parameter}"] = value.grad
    return gradients


def test_two_processes_give_the_gradients_and_the_run_of_one(tmp_path):
    """One of them is killed on the way: torchrun starts both again, and they go on."""
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "--max-restarts", "1", __file__, "distributed", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )  # fmt: skip
    assert json.loads((tmp_path / "resumed.json").read_text()) == [4, 1]
    assert same_files(tmp_path / "two", tmp_path / "killed")

    alone = one_step_gradients(0, 1)
    for rank in range(2):
        shared = load_file(tmp_path / f"gradients{rank}.safetensors")
        assert shared.keys() == alone.keys()
        for name, gradient in alone.items():
            error = (shared[name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
            assert float(error) < 1e-5, name

    result = run(tmp_path / "one")
    two = load_heads(tmp_path / "two" / LAST)[0].state_dict()
    for name, tensor in load_heads(tmp_path / "one" / LAST)[0].state_dict().items():
        if name.endswith("in_proj_bias"):
            continue  # a third of it has no gradient but rounding, which Adam makes large
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    curve = json.loads((tmp_path / "curve.json").read_text())
    for ours, theirs in zip(curve, result.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    # The row that one of two processes got is named to all.
    assert json.loads((tmp_path / "rows.json").read_text()) == [[303], [303]]


class Hanging(RandomBatches):
    """Never hands out the sixth batch."""

    def whole(self, position: int) -> CaptionBatch:
        if position == 6:
            time.sleep(1000)
        return super().whole(position)


def child_main() -> None:
    """What the tests above start in processes of their own."""
    directory = Path(sys.argv[2])
    if sys.argv[1] == "until killed":
        run(directory, batches=Hanging())
        return
    with processes() as rank:
        assert torch.distributed.get_world_size() == 2
        restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if restarts == 0:
            before_the_kill(directory, rank)
        begun = saved_step(directory / "killed")

        class Deadly(RandomBatches):
            def whole(self, position: int) -> CaptionBatch:
                if (position, rank, restarts) == (6, 1, 0):
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().whole(position)

        run(directory / "killed", batches=Deadly(rank=rank, processes=2), resume=True)
        if rank == 0:
            (directory / "resumed.json").write_text(json.dumps([begun, restarts]))


def before_the_kill(directory: Path, rank: int) -> None:
    """Gradients, an undisturbed run, and one with a bad row."""
    save_file(one_step_gradients(rank, 2), directory / f"gradients{rank}.safetensors")
    result = run(directory / "two", batches=RandomBatches(rank=rank, processes=2))

    class Poisoned(RandomBatches):
        def whole(self, position: int) -> CaptionBatch:
            batch = super().whole(position)
            if position == 3:
                batch.targets[3] = float("inf")
            return batch

    rows = [[], []]
    try:
        run(directory / "bad", batches=Poisoned(rank=rank, processes=2))
    except NonFiniteLossError as stop:
        torch.distributed.all_gather_object(rows, stop.rows)
    if rank == 0:
        (directory / "curve.json").write_text(json.dumps(result.curve))
        (directory / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    child_main()
