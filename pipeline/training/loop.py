"""Training the heads: optimiser, schedule, validation, checkpoints, several processes.

    ┌ batches ─ training_losses ─ backward ─ mean over processes ─ clip ─ AdamW ─ [IMG] rows ┐
    └ every n steps: log · validate, keep the best · write a state from which to go on ──────┘

Only the heads are trained. Their float32 parameters are the master copy (`trained_dtype` of the
objective); the language model's dtype decides in what they compute. The released code decays its
whole embedding table, frozen rows included, wherever float32 lets the decay through (UPSTREAM 28);
here frozen rows are no parameters and never change.

A run that is killed and resumed is bit-identical to an uninterrupted one on the same CPU: all
randomness is in generators whose state is saved, and the source of batches says where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor

from gill_errors import GillError, InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.checkpoint import (
    BEST,
    LAST,
    STATE,
    CheckpointError,
    CheckpointRecord,
    CurvePoint,
    TrainingState,
    load_state,
    optimizer_tensors,
    put_optimizer_tensors,
    put_tensors,
    save_heads,
    save_state,
    unlike_run,
)
from pipeline.bridge.denoising import draw_seeds
from pipeline.bridge.documents import DocumentBatch
from pipeline.bridge.mixed_batch import MixedBatch, num_captions
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.bridge.objective import PackingDraws, draw_packing
from pipeline.settings import Objective, TrainingSettings
from pipeline.training.distribution import (
    from_first_process,
    is_distributed,
    num_processes,
    of_all_processes,
    rank,
)
from pipeline.training.progress import Clock, TrainingProgress
from pipeline.training.stepping import NonFiniteStepError, Stepper
from pipeline.training.validation import guilty_rows, validate


@runtime_checkable
class BatchSource(Protocol):
    """Batches without end, and a position from which to continue.

    Under several processes each has a source of its own that yields its part of every global batch:
    equally many examples, in the global order of processes. The position must mean the same in all
    of them, as only that of the first is saved.
    """

    def __iter__(self) -> Iterator[CaptionBatch | MixedBatch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was handed out last (JSON), whatever was read ahead."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration begin at a position."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind, besides its files."""

    step: int
    curve: list[CurvePoint]
    """One row per logged step: `step` and `train/...`; validations: `step` and `validation/...`."""
    metrics: dict[str, float]
    """Of the last validation."""
    best_step: int | None


class NonFiniteLossError(GillError):
    """A loss or gradient that is not a number; names the rows of the caption table behind it."""

    def __init__(self, step: int, parts: dict[str, float], rows: Sequence[int], files: str) -> None:
        values = ", ".join(f"{name} {value}" for name, value in parts.items())
        super().__init__(
            f"step {step}: not finite ({values}). Caused by rows {list(rows)} of the caption "
            f"table. The weights were not changed; the last good ones are in {files}"
        )
        self.step, self.rows = step, list(rows)


def train(
    gill: MultimodalLanguageModel,
    batches: BatchSource,
    objective: Objective,
    settings: TrainingSettings,
    *,
    directory: str | Path,
    validation: Sequence[CaptionBatch | DocumentBatch] = (),
    contents: Int64[Tensor, " N"] | None = None,
    backbones: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    resume: bool = False,
    log: Callable[[CurvePoint], None] | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainingResult:
    """Train `gill.heads` for `settings.steps` steps.

    Writes to `directory`: `last.safetensors` and `state.safetensors` every `checkpoint_every` steps
    and at the end; `best.safetensors` at the validation with the highest text-to-image R@1, of
    equal ones the one with the lowest loss.

    Args:
        validation: held-out batches, read every `validate_every` steps and at the end.
        contents: which of all their rows show the same, as `validate` takes it.
        backbones: fingerprint of each frozen model by role, kept in the checkpoints.
        parameters: further sections of parameters behind this run, kept in the checkpoints.
        resume: go on from `state.safetensors`, where there is one. Of several processes only the
            first reads and writes it.
        log: receives every row of the curve; after a resume, those of the past first.
        on_progress: called after every logged step; see `show_progress`.

    >>> with processes(), DvcliveLog("artifacts/training/dvclive") as log:
    ...     train(gill, source, Objective.paper(), TrainingSettings.paper(),
    ...           directory="artifacts/training", log=log, on_progress=show_progress)

    Raises:
        CheckpointError: the state to resume from is damaged, or was made with other sizes,
            backbones or parameters; every difference is named.
        NonFiniteLossError: with the rows that caused it; the files keep what was saved before.
        ValueError: the batches do not fit `batch_size`, or end.
    """
    directory = Path(directory)
    record = CheckpointRecord(
        sizes=gill.heads.sizes,
        backbones=dict(backbones or {}),
        parameters={
            **(parameters or {}),
            "objective": objective.model_dump(mode="json"),
            "training": settings.numbers.model_dump(mode="json"),
        },
    )
    run = _Run(gill, batches, objective, settings, directory, record)
    if resume:
        run.resume()
    # After resuming: either all have the saved weights by now, or none has and each drew its own.
    run.share_weights()
    write = log if log is not None and rank() == 0 else lambda row: None
    for row in run.curve:
        write(row)
    clock = Clock(settings, run.step)
    # Not before: `resume` has set where the source begins.
    iterator = iter(batches)
    while run.step < settings.steps:
        with clock.waiting():
            batch = run.next_batch(iterator)
        run.advance(batch)
        clock.count(batch)
        done = run.step == settings.steps
        if run.step % settings.log_every == 0 or done:
            report = run.settle()
            write(run.note("train", report))
            if on_progress is not None and rank() == 0:
                on_progress(clock.progress(run.step, report))
        # In every process, as the passes of a sharded model are common ones; the first alone
        # writes. Before the state, so that a state holds the validation of its own step and
        # resuming skips it.
        if validation and (run.step % settings.validate_every == 0 or done):
            run.settle()
            write(run.note("validation", validate(gill, validation, objective, contents)))
            run.keep_best()
        if run.step % settings.checkpoint_every == 0 or done:
            run.settle()  # nothing is saved behind a step that was none
            run.save()
    return TrainingResult(run.step, run.curve, run.metrics, run.best_step)


class _Run:
    """The state of one training run, and how it is saved."""

    def __init__(
        self,
        gill: MultimodalLanguageModel,
        batches: BatchSource,
        objective: Objective,
        settings: TrainingSettings,
        directory: Path,
        record: CheckpointRecord,
    ) -> None:
        self.gill, self.batches = gill, batches
        self.objective, self.settings = objective, settings
        self.directory, self.record = directory, record
        self.stepper = Stepper(gill, objective, settings)
        # Alike in all processes: each tosses the coins of the global batch and takes its own.
        self.coins = torch.Generator().manual_seed(settings.seed)
        # One of its own, so that the coins are those of a run without a denoising loss.
        self.noise = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.curve: list[CurvePoint] = []

    @property
    def generators(self) -> dict[str, torch.Generator]:
        """Those that the objective draws from, by their name in the state."""
        used = {"coins": self.coins}
        return used | {"noise": self.noise} if self.objective.diffusion_weight else used

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last validation so far."""
        for row in reversed(self.curve):
            if _BEST_BY in row:
                return {k: v for k, v in row.items() if k.startswith("validation/")}
        return {}

    @property
    def best_step(self) -> int | None:
        """Step of the best validation so far: the highest R@1, of equal ones the lowest loss."""
        validated = [row for row in self.curve if _BEST_BY in row]
        # `max` keeps the first of equals.
        best = max(validated, key=_goodness, default=None)
        return None if best is None else int(best["step"])

    def next_batch(
        self, iterator: Iterator[CaptionBatch | MixedBatch]
    ) -> CaptionBatch | MixedBatch:
        try:
            batch = next(iterator)
        except StopIteration:
            raise InputError(
                f"the batches ended after step {self.step} of {self.settings.steps}; their source "
                "has to go on with the next epoch"
            ) from None
        if len(batch) * num_processes() != self.settings.batch_size:
            raise InputError(
                f"batch_size is {self.settings.batch_size}, but each of {num_processes()} "
                f"processes got {len(batch)} examples"
            )
        return batch.to(self.gill.language_model.device)

    def advance(self, batch: CaptionBatch | MixedBatch) -> None:
        """Take a step, whose numbers may be known with the next one's only (`settle`)."""
        captions = num_captions(batch) * num_processes()
        draws = draw_packing(captions, self.objective, self.coins)
        if self.objective.diffusion_weight:
            draws = replace(draws, noise=draw_seeds(captions, self.noise))
        draws = _own_draws(draws)
        with self._naming_rows():
            self.stepper.take(self.step, batch, draws)
        self.step += 1

    def settle(self) -> dict[str, float]:
        """The numbers of the last step. In every process: a bad one is told to all."""
        with self._naming_rows():
            return self.stepper.settle()

    @contextmanager
    def _naming_rows(self) -> Iterator[None]:
        try:
            yield
        except NonFiniteStepError as error:
            batch = error.batch
            guilty = of_all_processes(guilty_rows(self.gill, batch, self.objective))
            # Where no row is bad alone (only their contrast is), all of the batch are named.
            rows = guilty or of_all_processes(batch.rows.tolist())
            raise NonFiniteLossError(error.step, error.values, rows, str(self.directory)) from None

    def note(self, kind: str, values: Mapping[str, float]) -> CurvePoint:
        row: CurvePoint = {
            "step": self.step,
            **{f"{kind}/{name}": value for name, value in values.items()},
        }
        self.curve.append(row)
        return row

    def current_record(self) -> CheckpointRecord:
        return self.record.model_copy(update={"step": self.step, "metrics": self.metrics})

    def keep_best(self) -> None:
        if self.best_step == self.step and rank() == 0:
            save_heads(self.directory / BEST, self.gill.heads, self.current_record())

    def save(self) -> None:
        if rank() != 0:
            return
        state = TrainingState(
            record=self.current_record(),
            heads=self.gill.heads.state_dict(),
            optimizer=optimizer_tensors(self.stepper.optimizer, self.gill.heads),
            generators={name: one.get_state() for name, one in self.generators.items()}
            | {"torch": torch.get_rng_state()},
            data=self.batches.state_dict(),
            curve=self.curve,
        )
        # Killed between these two, the weights are ahead of the state: resuming goes on from the
        # state and takes the same steps again.
        save_heads(self.directory / LAST, self.gill.heads, state.record)
        save_state(self.directory / STATE, state)

    def resume(self) -> None:
        """Go on from the first process's state, where there is one; others need not see its disk.

        Raises CheckpointError, in every process.
        """
        path = self.directory / STATE
        # An error travels like a state: raised here, it would leave the others waiting.
        found: TrainingState | CheckpointError | None = None
        if rank() == 0 and path.exists():
            found = self._saved_state(path)
        state = from_first_process(found)
        if isinstance(state, CheckpointError):
            raise state
        if state is None:
            return
        put_tensors(self.gill.heads, state.heads, path)
        put_optimizer_tensors(self.stepper.optimizer, self.gill.heads, state.optimizer)
        for name, generator in self.generators.items():
            generator.set_state(state.generators[name])
        torch.set_rng_state(state.generators["torch"])
        self.batches.load_state_dict(state.data)
        self.step, self.curve = state.record.step, state.curve

    def _saved_state(self, path: Path) -> TrainingState | CheckpointError:
        """An error is handed on, so that all processes stop for the same reason."""
        try:
            state = load_state(path)
        except CheckpointError as error:
            return error
        if differing := unlike_run(state.record, self.record):
            return CheckpointError(
                f"{path} cannot be resumed: " + "; ".join(differing) + ". Restore these, or train "
                "anew"
            )
        return state

    def share_weights(self) -> None:
        """Begin with the first process's weights in all of them."""
        if is_distributed():
            for tensor in self.gill.heads.state_dict().values():
                dist.broadcast(tensor, src=0)


_BEST_BY = "validation/text_to_image_r1"


def _goodness(row: CurvePoint) -> tuple[float, float]:
    """What the best validation is the highest of; R@1 alone is often 1 among few contents."""
    return row[_BEST_BY], -row["validation/loss"]


def _own_draws(draws: PackingDraws) -> PackingDraws:
    """This process's pairs of the global batch, so that the number of processes changes nothing."""
    if not is_distributed():
        return draws
    pairs, processes = len(draws.captioning), num_processes()
    if pairs % processes:
        raise InputError(
            f"{pairs} pairs of examples cannot be dealt to {processes} processes: batch_size must "
            f"be a multiple of {2 * processes}"
        )
    # In examples: whole pairs, so that no packed pair is cut between two processes.
    share = 2 * (pairs // processes)
    return draws.part(share * rank(), share * (rank() + 1))
