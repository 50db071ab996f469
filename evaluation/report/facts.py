"""What was run on what and when, and how to run the same on the real sets."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from cluster.versions import library_versions
from evaluation.report.html import Block, Facts, Section, Text
from gill.artifacts import Artifacts
from pipeline.frozen.backbones import Backbones
from settings.params import Params
from workfolder import code_fingerprint

_LIBRARIES = (
    "torch", "transformers", "diffusers", "open_clip_torch", "faiss-cpu", "zarr", "dvc",
)  # fmt: skip
_REAL_SETS = """\
# params.yaml: start from presets/paper.yaml (OPT-6.7B, CLIP ViT-L/14, Stable Diffusion 1.5), train
# on the CC3M table (Train_GCC-training.tsv, pictures fetched beforehand), then name the files:
evaluation:
  vist:         # Tables 1, 3, 4, 5, Figure 6
    stories: data/vist/sis/val.story-in-sequence.json
    images: data/vist/images/val
  visdial:      # Table 2, Figure 8
    dialogues: data/visdial/visdial_1.0_val.json
    images: data/visdial/VisualDialog_val2018
  coco:         # Table 7, captions
    captions: data/coco/annotations/captions_val2017.json
    images: data/coco/val2017
  coco_2014:    # Table 8
    captions: data/coco/annotations/captions_val2014.json
    images: data/coco/val2014
  vqa:          # Table 7, questions
    questions: data/vqa/v2_OpenEnded_mscoco_val2014_questions.json
    annotations: data/vqa/v2_mscoco_val2014_annotations.json
    images: data/coco/val2014
  lpips_weights: data/weights/alexnet-owt-7be5be79.pth
  inception_weights: data/weights/weights-inception-2015-12-05-6726825d.pth
decision:
  votes: data/partiprompts/p2_annotations.tsv   # Table 6: the released annotations
"""
_COMMANDS = """\
$ cp presets/paper.yaml params.yaml      # then add the lines above
$ stages check-params                    # names every file that is not there
$ dvc repro                              # precompute, train, index, decide, evaluate, report
$ dvc exp run -n r4 -S model.r=4         # one ablation on the same caches
"""


def facts_section(params: Params, artifacts: Artifacts, findings: Mapping[str, Any]) -> Section:
    """Dates, versions, fingerprints and all params."""
    captions = json.loads(
        artifacts.captions.with_suffix(".report.json").read_text(encoding="utf-8")
    )
    facts = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "captions": f"{captions['source']}: {captions['kept']} kept, {captions['excluded']} left "
        f"out; " + ", ".join(f"{count} {split}" for split, count in captions["splits"].items())
        + f"; fingerprint {captions['fingerprint'][:12]}",
    }  # fmt: skip
    backbones = Backbones.read(artifacts.backbones)
    for role in Backbones.model_fields:
        one = getattr(backbones, role)
        revision = f", revision {one.revision}" if one.revision else ""
        facts[role.replace("_", " ")] = (
            f"{one.source}{revision}, {one.dtype}, weights {one.fingerprint[:12]}"
        )
    model, training, sampling = params.model, params.training, params.generation
    facts |= {
        "heads": f"k = {model.k}, r = {model.r}, m = {model.m}, p = {model.p}, {model.mapper.kind}",
        "training": f"{training.steps} steps of {training.batch_size}, seed {training.seed}",
        "sampling": f"{sampling.steps} steps, guidance {sampling.guidance:g}",
        "code": code_fingerprint("evaluation.tables"),
        "versions": _joined(library_versions(*_LIBRARIES))
        + f", Python {platform.python_version()} on {platform.machine()}",
    }
    if findings.get("cells", {}).get("finished"):
        facts["findings"] = _cells(findings["cells"])
    whole = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)
    blocks: list[Block] = [Facts(facts), Text(whole, "All params of this run", folded=True)]
    return Section("run", "What was run", "", blocks)


def real_sets_section() -> Section:
    """The same tables on the original files."""
    return Section(
        "real",
        "The same on the real sets",
        "Every table is measured on the original files once they are named; nothing is downloaded. "
        "What is missing or damaged in them is reported, and each table says on how many of how "
        "many examples it ran.",
        [Text(_REAL_SETS, "Files by their official names"), Text(_COMMANDS, "Commands")],
    )


def _cells(cells: Mapping[str, Any]) -> str:
    hours = cells["core_seconds"] / 3600
    return (
        f"{cells['finished']} of {cells['expected']} cells (variants times seeds), "
        f"{cells['first']} to {cells['last']}, {hours:.1f} core hours, "
        f"code {', '.join(cells['code'])}, {_joined(cells['versions'])}"
    )


def _joined(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
