"""The model card of a trained GILL: what it is, what it belongs to, what made it, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

_USE = """```python
from gill.loading import Gill

gill = Gill.from_pretrained("{name}"{backbones})
gill.reply(["a picture of a red kite over the sea.", picture, "and at night?"])
```"""

_CITATION = """```bibtex
@inproceedings{koh2023generating,
  title={Generating Images with Multimodal Language Models},
  author={Koh, Jing Yu and Fried, Daniel and Salakhutdinov, Ruslan},
  booktitle={NeurIPS},
  year={2023}
}
```"""


def write_model_card(
    config: Mapping[str, Any], record: Mapping[str, Any], *, has_decision: bool
) -> str:
    """The text of README.md, from config.json and the record of the checkpoint."""
    frozen = config["backbones"]
    front: dict[str, Any] = {
        "library_name": "gill",
        "pipeline_tag": "any-to-any",
        "tags": ["gill", "multimodal", "text-to-image", "image-retrieval", "image-captioning"],
    }
    # A base model is a repository of the hub; built-in tags are not.
    base = [one["source"] for one in frozen.values() if one["revision"] is not None]
    if base:
        front["base_model"] = base
    local = [role for role, one in frozen.items() if one["source"] is None]
    named = ", ".join(f'"{role}": "DIRECTORY"' for role in local)
    sizes, generation = config["sizes"], config["generation"]
    mapper = sizes["mapper"]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False).strip() + "\n---",
        "# GILL: text and pictures in, text and pictures out",
        "The trained part of a GILL "
        "([Generating Images with Multimodal Language Models](https://arxiv.org/abs/2305.17216)): "
        f"{config['num_parameters']:,} parameters that connect a frozen language model, a frozen "
        "visual encoder and a frozen image generator. It reads interleaved text and pictures, and "
        "answers with text and with pictures that it retrieves or generates.",
        "## Use",
        _USE.format(name="THIS/REPOSITORY", backbones=f", backbones={{{named}}}" if named else ""),
        "Retrieval needs an index of candidate pictures, which is built from your own; without one "
        "every picture is generated."
        + (" The classifier that chooses between the two is included." if has_decision else ""),
        "## Frozen models",
        "The trained part works with exactly these weights; others are refused.",
        _table(
            ("role", "model", "revision", "fingerprint", "dtype"),
            [
                (
                    role.replace("_", " "),
                    one["source"] or "a local directory",
                    one["revision"] or "",
                    one["fingerprint"][:16],
                    one["dtype"],
                )
                for role, one in frozen.items()
            ],
        ),
        "## Trained parts",
        _table(
            ("what", "size"),
            [
                ("[IMG] tokens (r)", sizes["r"]),
                ("visual tokens per picture (k)", sizes["k"]),
                ("mapping network", f"{mapper['kind']}, width {sizes['m']}"),
                ("generator's text space (L x D)", f"{sizes['L']} x {sizes['D']}"),
                ("retrieval space (p)", sizes["p"]),
            ],
        ),
        f"Pictures are sampled with {generation['steps']} steps and guidance "
        f"{generation['guidance']:g} unless asked otherwise.",
        "## Training",
        f"{config['step']:,} optimiser steps on picture-caption pairs.",
    ]
    if record["metrics"]:
        rows = [(name, f"{value:.4g}") for name, value in sorted(record["metrics"].items())]
        parts += ["Measured on held-out pairs at that step:", _table(("measure", "value"), rows)]
    if record["parameters"]:
        text = json.dumps(record["parameters"], indent=1)
        parts.append(
            f"<details><summary>All parameters</summary>\n\n```json\n{text}\n```\n\n</details>"
        )
    parts += [
        "## Limits",
        "It inherits what the frozen models learnt, their biases and their licences included. It "
        "was trained on captions: its pictures follow descriptions better than instructions, and "
        "it can state what is not in a picture. A generated picture is not evidence of anything.",
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
