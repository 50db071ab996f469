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

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.batch import CaptionBatch
from pipeline.checkpoint import (
    BEST,
    LAST,
    STATE,
    CheckpointError,
    CheckpointRecord,
    CurvePoint,
    TrainingState,
    differences,
    load_state,
    optimizer_tensors,
    put_optimizer_tensors,
    put_tensors,
    save_heads,
    save_state,
)
from pipeline.gill import Gill
from pipeline.image_tokens import rescale_image_rows
from pipeline.objective import Losses, PackingDraws, draw_packing, training_losses
from pipeline.settings import Objective, TrainingSettings
from pipeline.streams import captioning_stream, image_streams, pair_rows


@runtime_checkable
class BatchSource(Protocol):
    """Batches without end, and a position from which to continue.

    Under several processes each has a source of its own that yields its part of every global batch:
    equally many examples, in the global order of processes. The position must mean the same in all
    of them, as only that of the first is saved.
    """

    def __iter__(self) -> Iterator[CaptionBatch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the batch that was handed out last (JSON), whatever was read ahead."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next iteration begin at a position."""
        ...


@dataclass(frozen=True)
class Progress:
    """How training goes, for people."""

    step: int
    steps: int
    losses: dict[str, float]
    examples_per_second: float
    """Over all processes, as the next one."""
    tokens_per_second: float
    """Caption tokens."""
    waiting: float
    """Share of the time spent waiting for data, 0 to 1."""
    seconds_left: float

    def __str__(self) -> str:
        parts = " ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
        hours, seconds = divmod(round(self.seconds_left), 3600)
        return (
            f"step {self.step}/{self.steps}  {parts}  {self.examples_per_second:.0f} examples/s  "
            f"{self.tokens_per_second:.0f} tokens/s  data wait {self.waiting:.0%}  "
            f"ETA {hours}:{seconds // 60:02d}:{seconds % 60:02d}"
        )


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind, besides its files."""

    step: int
    curve: list[CurvePoint]
    """One row per logged step: `step` and `train/...`; validations: `step` and `validation/...`."""
    metrics: dict[str, float]
    """Of the last validation."""
    best_step: int | None


class NonFiniteStepError(Exception):
    """A step whose loss or gradient is not finite; `values` are its numbers."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__(f"not finite: {values}")
        self.values = values


class NonFiniteLossError(Exception):
    """A loss or gradient that is not a number; names the rows of the caption table behind it."""

    def __init__(self, step: int, parts: dict[str, float], rows: Sequence[int], files: str) -> None:
        values = ", ".join(f"{name} {value}" for name, value in parts.items())
        super().__init__(
            f"step {step}: not finite ({values}). Caused by rows {list(rows)} of the caption "
            f"table. The weights were not changed; the last good ones are in {files}"
        )
        self.step, self.rows = step, list(rows)


def show_progress(progress: Progress) -> None:
    """Print one line to standard error."""
    print(progress, file=sys.stderr, flush=True)


class DvcliveLog:
    """Writes the curve with dvclive: `metrics.json` and `plots/metrics/**.tsv` in `directory`.

    The project's dvc.yaml and experiments are left alone, and no git repository is needed. What
    dvclive wrote there before is replaced: a resumed run logs its whole curve again.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = directory
        self._live: Any = None

    def __call__(self, row: CurvePoint) -> None:
        if self._live is None:  # with the first row, which only one of several processes gets
            from dvclive import Live

            self._live = Live(dir=str(self._directory), dvcyaml=False, save_dvc_exp=False)
        self._live.step = int(row["step"])
        for name, value in row.items():
            if name != "step":
                self._live.log_metric(name, value)
        self._live.make_summary()

    def __enter__(self) -> DvcliveLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.end()


@contextmanager
def processes() -> Iterator[int]:
    """Join the other processes of `torchrun`, and leave them at the end; yields this one's rank.

    Does nothing without torchrun, or where the processes have joined already.
    """
    ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _is_distributed()
    if ours:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield _rank()
    finally:
        if ours:
            dist.destroy_process_group()


def from_first_process(decision: bool) -> bool:
    """What the process of rank 0 decided, in every process."""
    if not _is_distributed():
        return decision
    shared = [decision]
    dist.broadcast_object_list(shared)
    return shared[0]


class Stepper:
    """Optimiser steps on one model: AdamW over every trained tensor.

    The heads are put into the objective's `trained_dtype`.
    """

    def __init__(self, gill: Gill, objective: Objective, settings: TrainingSettings) -> None:
        self.gill, self.objective, self.settings = gill, objective, settings
        gill.heads.to(getattr(torch, objective.trained_dtype))
        self.optimizer = torch.optim.AdamW(
            gill.heads.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self._mean_row_norm = gill.language_model.mean_row_norm()

    def take(self, step: int, batch: CaptionBatch, draws: PackingDraws) -> dict[str, float]:
        """Step number `step`, from 0; returns loss, parts, gradient norm before clipping, rate.

        Under several processes `batch` and `draws` are this process's part and the step is that of
        the global batch: all return the same and change their heads alike.

        Raises NonFiniteStepError before anything is changed.
        """
        settings = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        losses = _dealt_losses(self.gill, batch, self.objective, draws)
        losses.total.backward()
        parameters = [p for p in self.gill.heads.parameters() if p.grad is not None]
        _average_gradients(parameters)
        limit = float("inf") if settings.clip_norm is None else settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        report = _mean_over_processes(_parts(losses)) | {"gradient_norm": norm}
        # The one wait for the device.
        values = dict(zip(report, torch.stack([v.float() for v in report.values()]).tolist()))
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteStepError(values)
        rate = settings.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.objective.rescale_image_rows:
            rescale_image_rows(self.gill.heads.image_embeddings, self._mean_row_norm)
        return values | {"learning_rate": rate}


def train(
    gill: Gill,
    batches: BatchSource,
    objective: Objective,
    settings: TrainingSettings,
    *,
    directory: str | Path,
    validation: Sequence[CaptionBatch] = (),
    backbones: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    resume: bool = False,
    log: Callable[[CurvePoint], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train `gill.heads` for `settings.steps` steps.

    Writes to `directory`: `last.safetensors` and `state.safetensors` every `checkpoint_every` steps
    and at the end; `best.safetensors` at the validation with the highest text-to-image R@1.

    Args:
        validation: held-out batches, read every `validate_every` steps and at the end.
        backbones: fingerprint of each frozen model by role, kept in the checkpoints.
        parameters: further sections of parameters behind this run, kept in the checkpoints.
        resume: go on from `state.safetensors`, where there is one.
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
            "training": settings.model_dump(mode="json"),
        },
    )
    run = _Run(gill, batches, objective, settings, directory, record)
    if resume and (directory / STATE).exists():
        run.resume()
    run.share_weights()
    write = log if log is not None and _rank() == 0 else _ignore
    for row in run.curve:
        write(row)
    clock = _Clock(settings, run.step)
    iterator = iter(batches)
    while run.step < settings.steps:
        with clock.waiting():
            batch = run.next_batch(iterator)
        report = run.advance(batch)
        clock.count(batch)
        done = run.step == settings.steps
        if run.step % settings.log_every == 0 or done:
            write(run.note("train", report))
            if on_progress is not None and _rank() == 0:
                on_progress(clock.progress(run.step, report))
        if validation and (run.step % settings.validate_every == 0 or done):
            write(run.note("validation", validate(gill, validation, objective)))
            run.keep_best()
        if run.step % settings.checkpoint_every == 0 or done:
            run.save()
    return TrainingResult(run.step, run.curve, run.metrics, run.best_step)


@torch.no_grad()
def validate(gill: Gill, batches: Sequence[CaptionBatch], objective: Objective) -> dict[str, float]:
    """Losses and recall on held-out rows, unpacked.

    Losses are means over examples. Retrieval is over all rows of all batches at once: its two
    losses, and R@1 of pictures given texts (`text_to_image_r1`) and of texts given pictures.
    """
    # Retrieval is measured below, over all rows; without it no process waits for another here.
    alone = objective.model_copy(update={"retrieval_weight": 0.0})
    sums: dict[str, float] = {}
    queries, keys = [], []
    for batch in batches:
        batch = batch.to(gill.language_model.device)
        draws = PackingDraws.same(len(batch), packed=False)
        for name, value in _parts(training_losses(gill, batch, alone, draws)).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        query, key = _retrieval_vectors(gill, batch)
        queries.append(query)
        keys.append(key)
    total = sum(map(len, batches))
    means = {name: value / total for name, value in sums.items()}
    scores = torch.cat(queries) @ torch.cat(keys).T
    own = torch.arange(total, device=scores.device)
    logits = gill.heads.logit_scale.float().exp() * scores
    to_image = float(F.cross_entropy(logits, own))
    to_text = float(F.cross_entropy(logits.T, own))
    return means | {
        "loss": means["loss"] + objective.retrieval_weight * (to_image + to_text),
        "text_to_image": to_image,
        "image_to_text": to_text,
        "text_to_image_r1": float((scores.argmax(dim=1) == own).float().mean()),
        "image_to_text_r1": float((scores.argmax(dim=0) == own).float().mean()),
    }


def take_examples(batch: CaptionBatch, start: int, stop: int) -> CaptionBatch:
    """Examples `start` to `stop` of a batch, for instance one process's part of a global one."""
    begin, end = int(batch.offsets[start]), int(batch.offsets[stop])
    cut = {
        field.name: getattr(batch, field.name)[start:stop]
        for field in fields(batch)
        if field.name not in ("tokens", "offsets") and getattr(batch, field.name) is not None
    }
    return replace(
        batch,
        tokens=batch.tokens[begin:end],
        offsets=batch.offsets[start : stop + 1] - begin,
        **cut,
    )


class _Run:
    """The state of one training run, and how it is saved."""

    def __init__(
        self,
        gill: Gill,
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
        self.coins = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.curve: list[CurvePoint] = []

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last validation so far."""
        for row in reversed(self.curve):
            if _BEST_BY in row:
                return {k: v for k, v in row.items() if k.startswith("validation/")}
        return {}

    @property
    def best_step(self) -> int | None:
        """Step of the best validation so far; the earlier one of two equals."""
        validated = [row for row in self.curve if _BEST_BY in row]
        return int(max(validated, key=lambda row: row[_BEST_BY])["step"]) if validated else None

    def next_batch(self, iterator: Iterator[CaptionBatch]) -> CaptionBatch:
        try:
            batch = next(iterator)
        except StopIteration:
            raise ValueError(
                f"the batches ended after step {self.step} of {self.settings.steps}; their source "
                "has to go on with the next epoch"
            ) from None
        if len(batch) * _num_processes() != self.settings.batch_size:
            raise ValueError(
                f"batch_size is {self.settings.batch_size}, but each of {_num_processes()} "
                f"processes got {len(batch)} examples"
            )
        return batch.to(self.gill.language_model.device)

    def advance(self, batch: CaptionBatch) -> dict[str, float]:
        draws = _own_draws(draw_packing(self.settings.batch_size, self.objective, self.coins))
        try:
            report = self.stepper.take(self.step, batch, draws)
        except NonFiniteStepError as error:
            guilty = _of_all_processes(_guilty_rows(self.gill, batch, self.objective))
            rows = guilty or _of_all_processes(batch.rows.tolist())
            raise NonFiniteLossError(self.step, error.values, rows, str(self.directory)) from None
        self.step += 1
        return report

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
        if self.best_step == self.step and _rank() == 0:
            save_heads(self.directory / BEST, self.gill.heads, self.current_record())

    def save(self) -> None:
        if _rank() != 0:
            return
        state = TrainingState(
            record=self.current_record(),
            heads=self.gill.heads.state_dict(),
            optimizer=optimizer_tensors(self.stepper.optimizer, self.gill.heads),
            generators={"coins": self.coins.get_state(), "torch": torch.get_rng_state()},
            data=self.batches.state_dict(),
            curve=self.curve,
        )
        save_heads(self.directory / LAST, self.gill.heads, state.record)
        save_state(self.directory / STATE, state)

    def resume(self) -> None:
        path = self.directory / STATE
        state = load_state(path)
        if found := differences(state.record, self.record):
            raise CheckpointError(
                f"{path} cannot be resumed: " + "; ".join(found) + ". Restore these, or train anew"
            )
        put_tensors(self.gill.heads, state.heads, path)
        put_optimizer_tensors(self.stepper.optimizer, self.gill.heads, state.optimizer)
        self.coins.set_state(state.generators["coins"])
        torch.set_rng_state(state.generators["torch"])
        self.batches.load_state_dict(state.data)
        self.step, self.curve = state.record.step, state.curve

    def share_weights(self) -> None:
        """Begin with the first process's weights in all of them."""
        if _is_distributed():
            for tensor in self.gill.heads.state_dict().values():
                dist.broadcast(tensor, src=0)


class _Clock:
    """Rates and remaining time since this process began."""

    def __init__(self, settings: TrainingSettings, first_step: int) -> None:
        self._settings, self._first_step = settings, first_step
        self._start = time.perf_counter()
        self._waited = 0.0
        self._examples = self._tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def count(self, batch: CaptionBatch) -> None:
        self._examples += len(batch) * _num_processes()
        self._tokens += len(batch.tokens) * _num_processes()

    def progress(self, step: int, report: Mapping[str, float]) -> Progress:
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        steps = self._settings.steps
        return Progress(
            step=step,
            steps=steps,
            losses={k: v for k, v in report.items() if k not in ("gradient_norm", "learning_rate")},
            examples_per_second=self._examples / elapsed,
            tokens_per_second=self._tokens / elapsed,
            waiting=self._waited / elapsed,
            seconds_left=elapsed / (step - self._first_step) * (steps - step),
        )


_BEST_BY = "validation/text_to_image_r1"


def _parts(losses: Losses) -> dict[str, Tensor]:
    """The total as `loss`, then its parts; the pooled one only where it is used."""
    parts = {field.name: getattr(losses, field.name).detach() for field in fields(losses)}
    loss = parts.pop("total")
    return {"loss": loss, **parts}


def _ignore(row: CurvePoint) -> None:
    pass


def _retrieval_vectors(
    gill: Gill, batch: CaptionBatch
) -> tuple[Float[Tensor, "B p"], Float[Tensor, "B p"]]:
    """Queries and keys of unpacked examples."""
    rows = pair_rows(len(batch), [False] * (len(batch) // 2))
    tokens = gill.image_tokens(batch, rows, supervise_captions=False, supervise_second=False)
    return gill.text_query(tokens.hidden), gill.image_key(batch.pooled)


@torch.no_grad()
def _guilty_rows(gill: Gill, batch: CaptionBatch, objective: Objective) -> list[int]:
    """Rows whose own inputs, vectors or losses are not finite."""
    alone = objective.model_copy(update={"retrieval_weight": 0.0})
    guilty = []
    for i in range(len(batch)):
        one = take_examples(batch, i, i + 1)
        losses = training_losses(gill, one, alone, PackingDraws.same(1, packed=False))
        inputs = [one.pooled, one.targets, *_retrieval_vectors(gill, one), losses.total]
        if not all(bool(x.isfinite().all()) for x in inputs):
            guilty.append(int(one.rows[0]))
    return guilty


# --- several processes ---------------------------------------------------------------------------


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _num_processes() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _own_draws(draws: PackingDraws) -> PackingDraws:
    """This process's pairs of the global batch, so that the number of processes changes nothing."""
    if not _is_distributed():
        return draws
    pairs, processes = len(draws.captioning), _num_processes()
    if pairs % processes:
        raise ValueError(
            f"{pairs} pairs of examples cannot be dealt to {processes} processes: batch_size must "
            f"be a multiple of {2 * processes}"
        )
    own = slice(pairs // processes * _rank(), pairs // processes * (_rank() + 1))
    return PackingDraws(
        list(draws.captioning)[own], list(draws.retrieval)[own], list(draws.generation)[own]
    )


def _dealt_losses(
    gill: Gill, batch: CaptionBatch, objective: Objective, draws: PackingDraws
) -> Losses:
    """`training_losses` whose mean over the processes is the loss of the global batch.

    Equally many examples per process make that true of means over examples. Means over tokens are
    weighted by each process's share of the tokens.
    """
    losses = training_losses(gill, batch, objective, draws)
    if not _is_distributed() or objective.token_reduction != "tokens":
        return losses
    counts = _supervised_counts(gill, batch, objective, draws)
    whole = torch.tensor(counts, dtype=torch.float64, device=losses.total.device)
    dist.all_reduce(whole)
    captioning, image_token = (
        count * _num_processes() / total for count, total in zip(counts, whole.tolist())
    )
    return replace(
        losses,
        captioning=losses.captioning * captioning,
        image_token=losses.image_token * image_token,
        total=losses.total
        + objective.captioning_weight * (captioning - 1) * losses.captioning
        + objective.image_token_weight * (image_token - 1) * losses.image_token,
    )


def _supervised_counts(
    gill: Gill, batch: CaptionBatch, objective: Objective, draws: PackingDraws
) -> tuple[int, int]:
    """Supervised positions of l_c and of l_p in this process."""
    if objective.separate_image_draws:
        raise ValueError(
            "objective: separate_image_draws with token_reduction = tokens is for one process only"
        )
    num_start, size = len(gill.language_model.start_ids), gill.heads.sizes
    captioning = captioning_stream(
        batch.lengths,
        pair_rows(len(batch), draws.captioning),
        size.k,
        num_start,
        objective.supervise_start,
    )
    images = image_streams(
        batch.lengths,
        pair_rows(len(batch), draws.retrieval),
        size.r,
        num_start,
        objective.image_token_targets == "caption_and_image_token",
        objective.supervise_second,
    )
    return len(captioning.targets), len(images.prefix.targets) + len(images.suffix.targets)


def _average_gradients(parameters: Sequence[Tensor]) -> None:
    """The mean over processes, in one message."""
    if not _is_distributed():
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= _num_processes()
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(part.view_as(grad))


def _mean_over_processes(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    if not _is_distributed():
        return parts
    values = torch.stack(list(parts.values()))
    dist.all_reduce(values)
    return dict(zip(parts, values / _num_processes()))


def _of_all_processes(rows: list[int]) -> list[int]:
    """Concatenated in the order of the processes."""
    if not _is_distributed():
        return rows
    gathered: list[list[int]] = [[] for _ in range(_num_processes())]
    dist.all_gather_object(gathered, rows)
    return [row for own in gathered for row in own]
