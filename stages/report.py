"""Stage report: what the other stages wrote, on one page."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app.report import Cell, Curves, Grid, Page, Table, write_report
from pipeline.backbones import Backbones
from stages.failures import StageError
from stages.params import Params
from stages.paths import ARTIFACTS, METRICS

METHODS = {"generator": "generator alone", "gill": "GILL"}
NUM_ATTRIBUTES = 5
TABLE_6_NAMES = {
    "always_retrieve": "always retrieve",
    "always_generate": "always generate",
    "random": "random",
    "heuristic": "similarity threshold",
    "linear": "linear classifier",
    "human": "human",
}


def run(params: Params) -> None:
    """Write artifacts/report/index.html."""
    evaluation = _read_json(ARTIFACTS.evaluation / "evaluation.json")
    decision = _read_json(ARTIFACTS.decision / "evaluation.json")
    records = _read_json(ARTIFACTS.evaluation / "records.json")
    captions = _read_json(ARTIFACTS.captions.with_suffix(".report.json"))
    is_miniature = params.captions.table == "miniature"
    what = (
        "the miniature world: 32x32 pictures of one object, tiny frozen models. These numbers say "
        "that the method works here, and nothing about photographs"
        if is_miniature
        else f"{params.captions.table}"
    )
    page = Page(
        title="GILL: what was trained and how well it works",
        lead=f"Run on {what}.",
        facts=_facts(params, captions),
        tables=[
            *_generation_tables(evaluation),
            *_retrieval_tables(evaluation),
            *_decision_tables(decision),
            *_exclusion_tables(captions),
        ],
        curves=_curves(METRICS / "train" / "plots" / "metrics"),
        grids=_grids(records, params.evaluation.examples_shown),
    )
    write_report(ARTIFACTS.report, page)
    print(f"open {ARTIFACTS.report}")


def _generation_tables(evaluation: dict[str, Any]) -> list[Table]:
    sets = [one for one in evaluation.values() if "generator" in one]
    judged = any("oracle" in one["gill"] for one in sets)
    columns = ["context", "examples"]
    for name in METHODS.values():
        columns += [f"{name}: right attributes"] * judged + [f"{name}: CLIP similarity"]
    rows = []
    for one in sets:
        row: list[Any] = [one["title"], one["examples"]]
        for method in METHODS:
            if judged:
                found = one[method].get("oracle")
                row.append(_with_error(found and found["attributes"], found["standard_error"]))
            similarity = one[method]["clip_similarity"]
            row.append(_with_error(similarity["mean"], similarity["standard_error"]))
        rows.append(row)
    note = (
        "Held-out examples; both methods share the frozen generator and the seeds. CLIP similarity "
        "is the cosine between generated and real picture in the run's own visual encoder."
    )
    if judged:
        note += (
            " Right attributes: share of place, colour, shape, size and side that the oracle reads."
        )
    tables = [Table("Generated pictures (after Tables 1 and 2 of the paper)", columns, rows, note)]
    captioning = evaluation["captioning"]
    if "attributes_right" in captioning:
        tables.append(
            Table(
                "Captions of held-out pictures",
                ["examples", "attributes named per caption", "of these right"],
                [
                    [
                        captioning["examples"],
                        captioning["attributes_said"],
                        captioning["attributes_right"],
                    ]
                ],
            )
        )
    return tables


def _retrieval_tables(evaluation: dict[str, Any]) -> list[Table]:
    names = {"all": "distinct scenes, seen and unseen", "held_out": "held-out"}
    directions = {"text_to_image": "picture for text", "image_to_text": "text for picture"}
    rows = [
        [names[name], found["candidates"], title, *(found[key].get(k) for k in ("1", "5", "10"))]
        for name, found in evaluation["retrieval"].items()
        for key, title in directions.items()
    ]
    columns = ["candidates", "number", "direction", "R@1", "R@5", "R@10"]
    return [Table("Retrieval", columns, rows, "Complete captions; chance is 1 / number at R@1.")]


def _decision_tables(decision: dict[str, Any]) -> list[Table]:
    if not decision["fitted"]:
        return []
    rows = [
        [
            title,
            decision[name]["macro_f1"],
            decision[name]["f1_gen"],
            decision[name]["f1_ret"],
            _over_seeds(decision["over_seeds"].get(name)),
        ]
        for name, title in TABLE_6_NAMES.items()
        if name in decision
    ]
    labels = ", ".join(f"{count} {name}" for name, count in decision["labels"].items())
    note = (
        f"Labels by {decision['labels_by']} ({labels}); measured on held-out prompts. Macro F1 is "
        "the mean of the F1 of both classes."
    )
    columns = ["method", "macro F1", "F1 of generate", "F1 of retrieve", "macro F1, 5 splits"]
    return [Table("Retrieve or generate (after Table 6)", columns, rows, note)]


def _over_seeds(found: dict[str, float] | None) -> str | None:
    return None if found is None else f"{found['mean']:.3f} ± {found['deviation']:.3f}"


def _exclusion_tables(captions: dict[str, Any]) -> list[Table]:
    if not captions["excluded"]:
        return []
    rows = list(captions["reasons"].items())
    return [
        Table(
            "Rows left out of the caption table",
            ["reason", "rows"],
            rows,
            f"Every one is named in {ARTIFACTS.captions.with_suffix('.excluded.tsv')}.",
        )
    ]


def _grids(records: list[dict[str, Any]], limit: int) -> list[Grid]:
    grids = []
    for name in dict.fromkeys(record["set"] for record in records):
        shown = [r for r in records if r["set"] == name and "gill" in r][:limit]
        columns = ["prompt", "real picture", "retrieved", *METHODS.values()]
        rows = [_grid_row(record) for record in shown]
        grids.append(Grid(name.replace("_", " "), columns, rows))
    return grids


def _grid_row(record: dict[str, Any]) -> Sequence[Cell]:
    said = f"\nGILL says: {record['caption']}" if record.get("caption") else ""
    row = [Cell(text=record["prompt"] + said), Cell(Path(record["real"]))]
    retrieved = record.get("retrieved")
    score = f"{record['retrieval_score']:.2f}" if retrieved else ""
    row.append(Cell(Path(retrieved) if retrieved else None, score))
    for method in METHODS:
        right = record.get(f"{method}_right")
        text = "" if right is None else f"{right} of {NUM_ATTRIBUTES}"
        good = None if right is None else right == NUM_ATTRIBUTES
        row.append(Cell(Path(record[method]), text, good))
    return row


def _curves(folder: Path) -> list[Curves]:
    titles = {
        "captioning": "Captioning loss",
        "image_token": "[IMG] token loss",
        "generation": "Generation loss",
        "text_to_image": "Retrieval loss, picture for text",
        "text_to_image_r1": "R@1 on held-out rows",
    }
    curves = []
    for name, title in titles.items():
        lines = {
            kind: _read_curve(folder / kind / f"{name}.tsv")
            for kind in ("train", "validation")
            if (folder / kind / f"{name}.tsv").is_file()
        }
        if lines:
            curves.append(Curves(title, "step", "", lines))
    return curves


def _read_curve(path: Path) -> tuple[list[float], list[float]]:
    with path.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return [float(row["step"]) for row in rows], [float(row[path.stem]) for row in rows]


def _facts(params: Params, captions: dict[str, Any]) -> dict[str, str]:
    backbones = Backbones.read(ARTIFACTS.backbones)
    facts = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "captions": f"{captions['source']}: {captions['kept']} kept, "
        f"{captions['excluded']} left out; "
        + ", ".join(f"{count} {split}" for split, count in captions["splits"].items()),
    }
    for role, name in (
        ("language_model", "language model"),
        ("visual_encoder", "visual encoder"),
        ("image_generator", "image generator"),
    ):
        backbone = getattr(backbones, role)
        facts[name] = f"{backbone.source} ({backbone.fingerprint[:12]})"
    model, training = params.model, params.training
    facts["heads"] = f"k={model.k}, r={model.r}, m={model.m}, p={model.p}, {model.mapper.kind}"
    facts["training"] = f"{training.steps} steps of {training.batch_size}, seed {training.seed}"
    generation = params.generation
    facts["generation"] = f"{generation.steps} steps, guidance {generation.guidance}"
    return facts


def _with_error(value: float | None, error: float | None) -> str | None:
    return None if value is None else f"{value:.3f} ± {error or 0:.3f}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StageError(f"{path} is missing: run the stages before this one") from None
