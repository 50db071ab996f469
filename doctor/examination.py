"""Command doctor: what a params file would need and cost, said before any weight is there.

Nothing is downloaded, trained or written. Frozen models are outlined from their configurations
(`doctor.blueprints`), memory is that of the real code run without contents (`doctor.memory`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from doctor.costs import StageCost, stage_costs, store_checks, table_8_advice
from doctor.machine import Library, Machine, look_at_libraries, look_at_machine
from doctor.models import Models, outline_models
from doctor.rows import Rows, count_rows
from doctor.training import Variant, training_variants
from gill.artifacts import ARTIFACTS
from pipeline.devices import quieten_libraries
from settings.params import Params


@dataclass(frozen=True)
class Findings:
    """Everything that the page shows."""

    params: str
    libraries: list[Library]
    machine: Machine
    models: Models
    rows: Rows
    stages: list[StageCost]
    variants: list[Variant]
    problems: list[str]
    """What cannot run as set, and what to do."""
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """For machines: the same, in bytes, hours and numbers."""
        models, machine = self.models, self.machine
        return {
            "params": self.params,
            "libraries": [{**asdict(lib), "fits": lib.fits} for lib in self.libraries],
            "machine": {**asdict(machine), "device_type": machine.device_type},
            "models": [asdict(line) for line in models.lines],
            "dimensions": None if models.sizes is None else models.sizes.model_dump(mode="json"),
            "trained_parameters": models.trained,
            "rows": asdict(self.rows),
            "stages": [asdict(stage) for stage in self.stages],
            "training_on_one_card": [asdict(variant) for variant in self.variants],
            "problems": self.problems,
            "warnings": self.warnings,
        }


def examine(
    params: Params, name: str, *, rows: int | None = None, card: str | None = None
) -> Findings:
    """Resolve everything without weights.

    Raises StageError for a card that is neither known nor a number of gigabytes.
    """
    quieten_libraries()
    machine = look_at_machine(params.run.device, card, ARTIFACTS.root)
    libraries = look_at_libraries()
    models = outline_models(params, machine.card)
    counted = count_rows(params, rows)
    costs = stage_costs(params, models, machine, counted)
    variants = training_variants(params, models)
    problems = [
        f"{lib.name} {lib.installed or 'is missing'}: pyproject.toml wants {lib.wanted}"
        for lib in libraries
        if not lib.fits
    ]
    problems += [*models.problems, *store_checks(params, models, counted)]
    problems += _too_large(params, machine, costs, variants)
    warnings = []
    if machine.card is None and any(cost.hours and cost.hours > 24 for cost in costs):
        warnings.append("days on a CPU: --card 24 (or a name) shows what a GPU would need")
    if machine.card is not None and not machine.card.has_bfloat16:
        warnings.append(f"{machine.card.name} has no bfloat16 in hardware: float32 or slow")
    warnings += table_8_advice(params, models, machine)
    return Findings(name, libraries, machine, models, counted, costs, variants, problems, warnings)


def _too_large(
    params: Params, machine: Machine, costs: list[StageCost], variants: list[Variant]
) -> list[str]:
    """Stages that do not fit, with what to do."""
    problems = []
    card = machine.card
    for cost in costs:
        needed = cost.device_memory or 0
        if card is not None and needed > card.memory:
            problems.append(
                f"{cost.name} needs {needed / 1e9:.1f} GB on the GPU, {card.name} has "
                f"{card.memory / 1e9:.1f}: {_advice(cost.name, card.memory, variants)}"
            )
        here = card is None or machine.card_is_here
        if here and cost.host_memory > machine.memory:
            problems.append(
                f"{cost.name} needs {cost.host_memory / 1e9:.1f} GB of main memory, there are "
                f"{machine.memory / 1e9:.1f}: {_host_advice(cost.name, card is not None)}"
            )
    written = sum(cost.written for cost in costs)
    if written > machine.free_disk:
        problems.append(
            f"the stages write {written / 1e9:.1f} GB below {machine.disk_of}, where "
            f"{machine.free_disk / 1e9:.1f} are free: set targets.codec.dtype: int8 (half), or "
            "targets.source: online (none), or GILL_WORK and DVC's cache to a larger disk "
            "(docs/howto/own-pictures.md)"
        )
    return problems


def _advice(stage: str, memory: int, variants: list[Variant]) -> str:
    if stage == "train":
        for variant in variants:
            if variant.device_memory <= memory:
                changes = ", ".join(f"{key}: {value}" for key, value in variant.changes.items())
                return f"set {changes} ({variant.device_memory / 1e9:.1f} GB)"
        return "no setting tried here fits: a smaller language model, or run.shard_language_model"
    return {
        "precompute-features": "set run.batch_sizes.features lower",
        "precompute-targets": "set run.batch_sizes.targets lower",
    }.get(
        stage,
        "set run.batch_sizes.pictures lower, run.vae_slicing: true, run.cpu_offload: "
        "model, backbones.language_model_quantization: int8",
    )


def _host_advice(stage: str, on_card: bool) -> str:
    if on_card:
        return "the weights pass through it while they are loaded"
    if stage == "train":
        return "set run.micro_batch_size lower, run.recompute_activations: true, or use a GPU"
    return "set its size in run.batch_sizes lower or use a GPU"


def show(findings: Findings, as_json: bool) -> str:
    """The page, or one JSON object."""
    if as_json:
        return json.dumps(findings.as_json(), indent=2)
    from doctor.page import page

    return page(findings)
