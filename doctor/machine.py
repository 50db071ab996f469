"""What `stages doctor` sees of this machine: versions, devices, room."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from doctor.throughput import Card, card_here, card_named, card_names, measure_rate
from gill_errors import StageError

_SHOWN = (
    "torch",
    "transformers",
    "diffusers",
    "open_clip_torch",
    "zarr",
    "faiss-cpu",
    "dvc",
    "dask",
    "accelerate",
    "safetensors",
)


@dataclass(frozen=True)
class Library:
    """An installed distribution, and whether pyproject.toml is content with it."""

    name: str
    installed: str | None
    wanted: str

    @property
    def fits(self) -> bool:
        """Whether the installed version is one that is wanted."""
        if self.installed is None:
            return False
        return SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


@dataclass(frozen=True)
class Machine:
    """What there is to compute with. Bytes, and operations per second."""

    card: Card | None
    card_is_here: bool
    cards: list[str]
    cores: int
    memory: int
    free_disk: int
    disk_of: str
    cpu_rates: dict[str, float] = field(default_factory=dict)
    """Of one thread, by dtype: those that were asked for."""

    def rate_of(self, dtype: torch.dtype) -> float | None:
        """Operations per second in a dtype; None for a card of which they are unknown."""
        if self.card is not None:
            return self.card.rate_of(dtype)
        name = str(dtype).removeprefix("torch.")
        if name not in self.cpu_rates:
            self.cpu_rates[name] = measure_rate(torch.device("cpu"), dtype)
        return self.cpu_rates[name]

    @property
    def device_type(self) -> str:
        """`cuda` where there is a card, or one is thought of."""
        return "cpu" if self.card is None else "cuda"


def look_at_machine(device: str, thought_of: str | None, artifacts: Path) -> Machine:
    """This machine, with the card that is thought of in the place of its own.

    Raises StageError for a card of no known name that is no number of gigabytes either, and where
    a GPU is asked for and there is none.
    """
    card, here = None, thought_of is None
    if thought_of is not None:
        card = card_named(thought_of)
        if card is None:
            raise StageError(
                f"--card {thought_of}: neither gigabytes nor one of {', '.join(card_names())}"
            )
    elif device != "cpu":
        card = card_here()
        if card is None and device != "auto":
            raise StageError(f"run.device is {device}, but torch finds no GPU here")
    place = artifacts.absolute()
    while not place.exists():
        place = place.parent
    return Machine(
        card=card,
        card_is_here=here and card is not None,
        cards=_cards_here(),
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().total,
        free_disk=shutil.disk_usage(place).free,
        disk_of=str(artifacts),
    )


def look_at_libraries() -> list[Library]:
    """Python, then the libraries that decide most, then every other that does not fit."""
    python = Library("Python", platform.python_version(), _wanted_python())
    wanted: dict[str, str] = {}
    for line in requires("gill") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            wanted[requirement.name] = str(requirement.specifier)
    found = [Library(name, _installed(name), spec) for name, spec in wanted.items()]
    shown = [library for library in found if library.name in _SHOWN]
    others = [library for library in found if library.name not in _SHOWN and not library.fits]
    return [python, *shown, *others]


def _wanted_python() -> str:
    return metadata("gill")["Requires-Python"] or ""


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cards_here() -> list[str]:
    """Every GPU with its memory and whether it computes in bfloat16."""
    if not torch.cuda.is_available():
        return []
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bfloat16 = "bfloat16" if properties.major >= 8 else "no bfloat16"
        lines.append(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bfloat16}")
    return lines
