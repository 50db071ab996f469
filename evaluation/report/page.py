"""The report: one self-contained HTML page (no script, no font and no picture from outside).

pictures · findings · the paper's tables · beyond the paper · figures · failures · what was run

Nothing here computes a result: page.html shows what the stages wrote. Pictures become smaller until
the page is under 10 MB.
"""

from __future__ import annotations

import base64
import io
import json
import platform
import re
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from cluster.versions import library_versions
from corpora.pictures import open_picture
from evaluation import findings
from evaluation.report.curves import draw
from evaluation.report.differences import draw_differences, measured_parts
from evaluation.report.figures import figures, training_curves
from evaluation.report.grids import failures, grids, talks, told
from evaluation.report.tables import Table, absences, paper_tables
from evaluation.report.told import told_stories
from evaluation.report.words import METHODS, METRICS, set_name
from evaluation.results import read_records, read_results
from gill.artifacts import Artifacts
from gill_errors import GillError
from pipeline.frozen.backbones import Backbones
from settings.params import Params
from workfolder import code_fingerprint

LARGEST_PAGE = 10_000_000
_SIDES = (256, 160, 96, 64)
_LIBRARIES = (
    "torch", "transformers", "diffusers", "open_clip_torch", "faiss-cpu", "zarr", "dvc",
)  # fmt: skip


class ReportError(GillError):
    """A page that cannot be written; the message says why."""


def write_page(params: Params, path: Path, artifacts: Artifacts, metrics: Path) -> None:
    """Write the page to `path`, pictures and curves inside it.

    Raises ReportError when even with the smallest pictures it is over 10 MB.
    """
    content = page_content(params, artifacts, metrics)
    for side in _SIDES:
        html = render(content, side).encode("utf-8")
        if len(html) <= LARGEST_PAGE:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(html)
            return
    raise ReportError(
        f"the report is {len(html) / 1e6:.1f} MB with pictures of {_SIDES[-1]} pixels; at most "
        f"{LARGEST_PAGE / 1e6:.0f} are wanted: show fewer (evaluation.examples_shown)"
    )


def page_content(params: Params, artifacts: Artifacts, metrics: Path) -> dict[str, Any]:
    """What page.html shows, by the names that it has there."""
    results = read_results(artifacts.evaluation / "results.json")
    records = read_records(artifacts.evaluation / "records.parquet")
    judged = artifacts.findings / "findings.json"
    found = _read_json(judged) if judged.is_file() else findings.of_main_run(artifacts)
    shown = params.evaluation.examples_shown
    return {
        "findings": found,
        "tables": paper_tables(results, found, _presets(artifacts)),
        "beyond": [
            Table(note=f"{' '.join(study['cells']['notes'])} {table.pop('note')}".strip(), **table)
            for path in sorted((artifacts.findings / "tables").glob("*.json"))
            for study in [_read_json(path)]
            for table in study["tables"]
        ],
        "absences": absences(results),
        "figures": figures(results, found),
        "training_curves": training_curves(metrics / "train" / "plots" / "metrics"),
        "talks": talks(records),
        "grids": grids(records, shown),
        "told_stories": told_stories(records, shown),
        "captioned": [r for r in records if r.set == "coco_captioning"][:shown],
        "questions": [r for r in records if r.set == "vqa"][:shown],
        "failures": failures(records),
        "made": datetime.now(UTC),
        "captions": _read_json(artifacts.captions.with_suffix(".report.json")),
        "excluded_file": artifacts.captions.with_suffix(".excluded.tsv"),
        "backbones": dict(Backbones.read(artifacts.backbones)),
        "params": params,
        "params_text": yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False),
        "code": code_fingerprint("evaluation.tables"),
        "versions": library_versions(*_LIBRARIES),
        "python": f"Python {platform.python_version()} on {platform.machine()}",
    }


def render(content: dict[str, Any], side: int) -> str:
    """The page as HTML, pictures at most `side` pixels wide and high."""
    environment = Environment(
        loader=PackageLoader("evaluation.report", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "picture": partial(_picture_uri, side=side),
        "number": _number,
        "coded": _coded,
        "light": partial(draw, dark=False),
        "dark": partial(draw, dark=True),
        "differences_light": partial(draw_differences, dark=False),
        "differences_dark": partial(draw_differences, dark=True),
        "measured_parts": measured_parts,
        "told": told,
        "set_name": set_name,
    }
    environment.tests["figure"] = _is_figure
    environment.globals |= {
        "METRICS": METRICS,
        "METHODS": METHODS,
        "measured_numbers": lambda found: [
            finding["number"] for finding in found["findings"] if measured_parts(finding)
        ],
    }
    return environment.get_template("page.html").render(content)


def _number(value: str | float | None) -> str | int:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else value


def _is_figure(value: str | float | None) -> bool:
    """Whether a value is set as a number: a text like `0.612 ± 0.001` or `+0.1 [0, +0.2]`."""
    if isinstance(value, str):
        return re.fullmatch(r"[-+]?[0-9][-+0-9., ±\[\]]*", value) is not None
    return isinstance(value, int | float)


def _coded(text: str) -> Markup:
    """Words between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _picture_uri(reference: str | None, side: int) -> str:
    """A data URI: PNG for small pictures, JPEG for large ones."""
    buffer = io.BytesIO()
    picture = _opened(reference or "")
    if max(picture.size) <= 64:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
        small.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _opened(reference: str) -> Image.Image:
    """A picture of the report; contexts come from files, tar members and folders alike."""
    picture = open_picture(reference)
    picture.thumbnail((320, 320))  # hundreds of photographs fit in memory
    return picture


def _presets(artifacts: Artifacts) -> dict[str, dict[str, Any]]:
    """The numbers of GILL under other presets, by their names."""
    files = sorted(artifacts.presets.glob("*/artifacts/findings/findings.json"))
    return {path.relative_to(artifacts.presets).parts[0]: _read_json(path) for path in files}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
