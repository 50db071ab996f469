"""The variants of findings/variants.yaml, and the params of each of their cells.

A cell is one variant trained and measured with one seed. Its heads, its results and its curves lie
in artifacts/findings/VARIANT/SEED; everything frozen and cached is that of the main run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from gill.artifacts import ARTIFACTS, Artifacts
from gill_errors import StageError
from gill_records import Record
from settings.params import Params, parse_params, read_unchecked
from workfolder import code_fingerprint

VARIANTS = Path("findings/variants.yaml")
BASELINE = "gill"
# Sections on which a cell's results depend; the others made the caches, whose content counts.
_SECTIONS = (
    *("captions", "model", "batches", "objective", "training"),
    *("index", "decision", "generation", "evaluation"),
)

CellStage = Literal["precompute-latents", "train", "build-index", "fit-decision", "evaluate"]


class Variant(Record):
    """One way to train, as changes of params.yaml."""

    title: str = Field(description="for people")
    stages: tuple[CellStage, ...] = Field(
        ("train", "evaluate"), description="what a cell runs, in this order"
    )
    params: dict[str, Any] = Field({}, description="laid over params.yaml and `common`")
    captioning_of: str | None = Field(
        None,
        description="variant whose W_cap of the same seed is taken (training.captioning_from); it "
        "runs first",
    )
    starts_from: str | None = Field(
        None,
        description="variant from whose heads of the same seed training goes on "
        "(training.start_from); it runs first",
    )

    @property
    def others(self) -> dict[str, str]:
        """Variants whose heads this one reads, by the key of `training` that names them."""
        named = {"captioning_from": self.captioning_of, "start_from": self.starts_from}
        return {key: name for key, name in named.items() if name is not None}


class StudyTable(Record):
    """A table of a study that asks what the paper does not: a row per variant, or as `rows` say."""

    title: str = Field(description="what is asked")
    note: str = Field("", description="what is measured, on what")
    columns: dict[str, str] = Field(
        description="title to VARIANT/SET/METHOD/METRIC, or that and /ceiling; * is the row's name"
    )
    rows: dict[str, str] = Field(
        {}, description="title to what * stands for; none: every variant that has numbers"
    )


class Study(Record):
    """All of findings/variants.yaml, or of another file of its kind."""

    seeds: tuple[int, ...] = Field(min_length=1)
    common: dict[str, Any] = Field({}, description="laid over params.yaml in every cell")
    variants: dict[str, Variant]
    tables: tuple[StudyTable, ...] = Field(
        (), description="beyond the paper; none: the paper's findings are judged"
    )

    def variant(self, name: str) -> Variant:
        """Raises StageError naming those that exist."""
        if name not in self.variants:
            raise StageError(
                f"there is no variant {name}; {VARIANTS} has {', '.join(self.variants)}"
            )
        return self.variants[name]


@dataclass(frozen=True)
class Cell:
    """One variant with one seed."""

    name: str
    seed: int
    folder: Path

    @property
    def artifacts(self) -> Artifacts:
        """Its own heads and results; the caches of the main run."""
        return Artifacts(self.folder, shared=self.folder.parents[2])

    @property
    def record(self) -> Path:
        """Written last: params, inputs, seconds. Without it the cell is not finished."""
        return self.folder / "cell.json"

    @property
    def log(self) -> Path:
        """What the cell printed."""
        return self.folder / "log.txt"

    def beside(self, name: str) -> Cell:
        """The cell of another variant with the same seed."""
        return Cell(name, self.seed, self.folder.parents[1] / name / str(self.seed))

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def read_study(path: Path = VARIANTS) -> Study:
    """Raises StageError when the file is missing or has a wrong key."""
    try:
        return Study.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run in the repository root") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise StageError(f"{path} cannot be used: {error}") from None


def cell(name: str, seed: int, artifacts: Artifacts = ARTIFACTS) -> Cell:
    """Where a variant with a seed lies."""
    return Cell(name, seed, artifacts.findings / name / str(seed))


def cell_params(file: Path, study: Study, name: str, seed: int) -> Params:
    """The params of a cell, checked.

    Raises StageError for an unknown variant, ParamsError for a missing file, or a change that
    names no key.
    """
    return parse_params(cell_values(file, study, name, seed), Path(f"{file} with variant {name}"))


def cell_values(file: Path, study: Study, name: str, seed: int) -> dict[str, Any]:
    """What a person would write: params.yaml with the changes of a variant and a seed."""
    values, variant = read_unchecked(file), study.variant(name)
    sections = ("model", "training", "evaluation", "decision")
    seeds = {section: {"seed": seed} for section in sections}
    for changes in (study.common, variant.params, seeds):
        values = lay_over(values, changes)
    for key, other in variant.others.items():
        trained = cell(other, seed).artifacts.model
        values = lay_over(values, {"training": {key: str(trained)}})
    return values


def lay_over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping; a list or a value is replaced whole."""
    laid = dict(base)
    for key, value in changes.items():
        old = laid.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        laid[key] = lay_over(old, value) if both else value  # type: ignore[arg-type]
    return laid


def cell_fingerprint(params_file: Path, study: Study, one: Cell) -> str:
    """What a cell's results follow from: its params, the frozen models, the content of the caches.

    Also what those of the cells follow from whose heads, or W_cap, it takes.

    Raises StageError when the caches are not there yet.
    """
    params = cell_params(params_file, study, one.name, one.seed)
    variant = study.variant(one.name)
    other, start = variant.captioning_of, variant.starts_from
    content = {
        "params": {name: getattr(params, name).model_dump(mode="json") for name in _SECTIONS},
        "stages": variant.stages,
        "code": code_fingerprint("evaluation.tables"),
        "training": code_fingerprint("stages.head_training"),
        "inputs": _inputs(one.artifacts),
        "captioning": other and cell_fingerprint(params_file, study, one.beside(other)),
    }
    # Only where they are used: finished cells keep their fingerprints.
    if start is not None:
        content["start"] = cell_fingerprint(params_file, study, one.beside(start))
    if params.objective.diffusion_weight:
        content["latents"] = code_fingerprint("stages.latent_store")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _inputs(artifacts: Artifacts) -> dict[str, Any]:
    """Fingerprints of what the cells share."""
    manifest = artifacts.backbones
    if not manifest.is_file() or not artifacts.captions.is_file():
        raise StageError(f"{artifacts.common} has no caches yet: run `dvc repro` first")
    backbones = json.loads(manifest.read_text(encoding="utf-8"))
    inputs = {role: found["fingerprint"] for role, found in backbones.items()}
    for store in (artifacts.features, artifacts.targets):
        summary = store.with_suffix(".manifest.json")
        if summary.is_file():
            inputs[store.stem] = json.loads(summary.read_text(encoding="utf-8"))["content"]
    drawn = artifacts.miniature / "drawn.json"
    if drawn.is_file():
        inputs["miniature"] = hashlib.sha256(drawn.read_bytes()).hexdigest()
    return inputs


def is_finished(one: Cell, fingerprint: str) -> bool:
    """Whether a cell is there with exactly these params and inputs."""
    if not one.record.is_file():
        return False
    return json.loads(one.record.read_text(encoding="utf-8")).get("fingerprint") == fingerprint


def is_done(params_file: Path, study: Study, one: Cell) -> bool:
    """Whether a cell is finished with these params and caches."""
    return is_finished(one, cell_fingerprint(params_file, study, one))
