"""How fast devices multiply: measured where the device is here, published where it is named.

Hours are operations / (share * rate). The shares are assumptions, stated wherever hours are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

TRAINING_SHARE = 0.5
ENCODING_SHARE = 0.7
ANSWERING_SHARE = 0.1
"""Of the rate of one large matrix product, what training, encoding and answering a token at a time
are taken to reach."""


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in bytes, and operations per second of dense products; None: unknown."""

    name: str
    memory: int
    rate: float | None
    """Of 16-bit numbers summed in 32 bits."""
    float32_rate: float | None
    has_bfloat16: bool = True

    def rate_of(self, dtype: torch.dtype) -> float | None:
        """Operations per second in a dtype."""
        return self.float32_rate if dtype == torch.float32 else self.rate


_CARDS = [
    Card(
        name,
        int(known["gigabytes"] * 1e9),
        known["half"] * 1e12,
        known["single"] * 1e12,
        known.get("bfloat16", True),
    )
    for name, known in yaml.safe_load(
        Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    ).items()
]


def card_named(text: str) -> Card | None:
    """A card by name (`RTX 4090`) or by its gigabytes alone (`24`); None for neither."""
    wanted = text.lower().replace(" ", "")
    for card in _CARDS:
        if card.name.lower().replace(" ", "") == wanted:
            return card
    try:
        gigabytes = float(text)
    except ValueError:
        return None
    return Card(f"a card of {text} GB", int(gigabytes * 1e9), None, None) if gigabytes > 0 else None


def card_names() -> list[str]:
    """The cards that are known by name."""
    return [card.name for card in _CARDS]


def card_here() -> Card | None:
    """The first GPU of this machine with its measured rate; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    device = torch.device("cuda")
    rate, single = (measure_rate(device, kind, size=8192) for kind in (dtype, torch.float32))
    return Card(properties.name, properties.total_memory, rate, single, has_bfloat16)


def measure_rate(device: torch.device, dtype: torch.dtype, size: int = 768) -> float:
    """Operations per second of the quickest of a few square matrix products.

    On a CPU per second of CPU time, that is of one thread, whatever else the machine does.
    """
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = _now(device)
        a @ a
        best = min(best, _now(device) - start)
    return 2 * size**3 / max(best, 1e-9)


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
