"""The prompt files of text-to-image benchmarks, and where each looks for the pictures of a prompt.

    GenEval        evaluation_metadata.jsonl          00000/samples/0000.png, 00000/metadata.jsonl
    DPG-Bench      a folder of NAME.txt               NAME.png, a 2x2 grid of four
    PartiPrompts   PartiPrompts.tsv, or a line each   00000-0.png (it has no layout of its own)

Prompts are taken as they are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from corpora.parti_prompts import read_prompts
from corpora.records import CorpusError

Benchmark = Literal["geneval", "dpg", "parti"]


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One prompt; `name` is what its pictures are called after."""

    name: str
    prompt: str
    metadata: str | None = None
    """GenEval's line, which its scorer reads beside the pictures."""


def read_benchmark_prompts(path: Path) -> tuple[Benchmark, list[BenchmarkPrompt]]:
    """Which benchmark's a file or folder is, and its prompts in their order.

    Raises CorpusError naming the file, the line and what is wrong.
    """
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise CorpusError(f"{path}: no .txt in it; DPG-Bench has a prompt in each")
        return "dpg", [BenchmarkPrompt(file.stem, _text(file)) for file in files]
    if not path.is_file():
        raise CorpusError(f"{path} is missing: name a file or folder of prompts")
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return "geneval", [
            _geneval(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
        ]
    rows = read_prompts(path)
    return "parti", [BenchmarkPrompt(f"{n:05d}", row.prompt) for n, row in enumerate(rows)]


def picture_name(benchmark: Benchmark, prompt: BenchmarkPrompt, sample: int) -> str:
    """Where a sample of a prompt lies, below the folder of the benchmark's pictures.

    All samples of DPG-Bench are in one picture.
    """
    match benchmark:
        case "geneval":
            return f"{prompt.name}/samples/{sample:04d}.png"
        case "dpg":
            return f"{prompt.name}.png"
        case "parti":
            return f"{prompt.name}-{sample}.png"


def _text(file: Path) -> str:
    text = file.read_text(encoding="utf-8").strip()
    if not text:
        raise CorpusError(f"{file}: no prompt in it")
    return text


def _geneval(path: Path, number: int, line: str) -> BenchmarkPrompt:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise CorpusError(f'{path}:{number}: no object with a "prompt", as GenEval has on a line')
    return BenchmarkPrompt(f"{number - 1:05d}", prompt, line)
