"""Retrieve or generate: the classifier that decides for one set of [IMG] tokens.

    hidden [N, r, e] (LM hidden states at [IMG1..r]), similarity [N] (highest candidate cosine)
      -> features [N, f]: e or r e, plus one for the similarity
      -> standardise -> linear -> logits [N, 2], class 0 = "gen", 1 = "ret"
      -> sigmoid(slope (logit gen - logit ret) + offset) = p(generate) [N], calibrated

Paper: section 3.3, appendix C. The released model is `Linear(4096, 2)` on the hidden state of the
first [IMG] token alone (its code counts them from [IMG0]). `decision_fitting` fits it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from safetensors.torch import load_file, save_file
from torch import Tensor

from gill_errors import InputError
from gill_files import written_whole

_TENSORS, _RECORD = "decision.safetensors", "decision.json"


class DecisionError(InputError):
    """The decision model cannot be fitted, read or used: what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class DecisionModel:
    """A fitted decision model; plain torch, no scikit-learn.

    `threshold`: at least this p(generate) means "gen". `heads`: the fingerprint of the heads whose
    hidden states it was fitted on.
    """

    weight: Float32[Tensor, "2 f"]
    bias: Float32[Tensor, " c"]
    mean: Float32[Tensor, " f"]
    scale: Float32[Tensor, " f"]
    slope: float = 1.0
    offset: float = 0.0
    threshold: float = 0.5
    img_tokens: Literal["first", "all"] = "first"
    use_similarity: bool = True
    heads: str = ""

    def logits(
        self, hidden: Float[Tensor, "N r e"], similarity: Float[Tensor, " N"] | None
    ) -> Float32[Tensor, "N 2"]:
        """Uncalibrated logits, column 0 "gen", column 1 "ret"."""
        features = decision_features(hidden, similarity, self.img_tokens, self.use_similarity)
        if features.shape[1] != self.mean.shape[0]:
            raise DecisionError(
                f"got {features.shape[1]} features a row, the decision model was fitted on "
                f"{self.mean.shape[0]} ({self.img_tokens} [IMG] hidden states"
                f"{' and the similarity' if self.use_similarity else ''})"
            )
        return (features - self.mean) / self.scale @ self.weight.T + self.bias

    def decide(
        self, hidden: Float[Tensor, "N r e"], similarity: Float[Tensor, " N"] | None = None
    ) -> Float32[Tensor, " N"]:
        """p(generate) of every row, float32 on the CPU.

        `hidden` are the last LM hidden states at the r [IMG] tokens; `similarity` the highest
        cosine of the retrieval embedding over the candidates, which a model without it ignores.
        DecisionError when the widths are not those that the model was fitted on.
        """
        logits = self.logits(hidden, similarity)
        return torch.sigmoid(self.slope * (logits[:, 0] - logits[:, 1]) + self.offset)

    @classmethod
    def from_linear(
        cls, weight: Float[Tensor, "2 e"], bias: Float[Tensor, " c"], heads: str = ""
    ) -> DecisionModel:
        """A model of the released layout: softmax over a linear map of one hidden state.

        DecisionError unless the bias has 2 elements (c = 2: "gen" and "ret").
        """
        if bias.shape != (2,):
            raise DecisionError(f"the bias has shape {tuple(bias.shape)}, expected (2,)")
        width = weight.shape[1]
        return cls(
            weight.float().cpu(),
            bias.float().cpu(),
            torch.zeros(width),
            torch.ones(width),
            use_similarity=False,
            heads=heads,
        )

    def to_linear(self) -> tuple[Float32[Tensor, "2 e"], Float32[Tensor, " c"]]:
        """(weight, bias) of the released layout: softmax over them gives p(generate).

        The inverse of `from_linear`, bit for bit. DecisionError for a model that reads more than
        the first hidden state, which that layout cannot hold.
        """
        if self.img_tokens != "first" or self.use_similarity:
            raise DecisionError(
                "the released layout holds a linear map of the first [IMG] hidden state alone; fit "
                'with img_tokens "first" and use_similarity false to write it'
            )
        weight = self.weight / self.scale
        bias = (self.bias - weight @ self.mean) * self.slope
        return weight * self.slope, bias + torch.tensor([self.offset, 0.0])

    def save(self, folder: Path) -> None:
        """Write `decision.safetensors` and, last, `decision.json`, each whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in _SHAPES}
        record = {name: getattr(self, name) for name in _SCALARS}
        with written_whole(folder / _TENSORS) as part:
            save_file(tensors, part)
        with written_whole(folder / _RECORD) as part:
            part.write_text(json.dumps({"format": 1, **record}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, *, heads: str | None = None) -> DecisionModel:
        """Read what `save` wrote.

        DecisionError when a file is missing or malformed, or when the model was fitted on other
        heads than `heads` (None skips that check), naming both.
        """
        try:
            record = json.loads((folder / _RECORD).read_text())
            tensors = load_file(folder / _TENSORS)
        except Exception as error:  # safetensors raises its own kind
            raise DecisionError(f"no decision model can be read from {folder}: {error}") from error
        if (
            not isinstance(record, dict)
            or record.pop("format", None) != 1
            or set(record) != set(_SCALARS)
            or set(tensors) != set(_SHAPES)
        ):
            raise DecisionError(
                f"{folder} does not hold a decision model of format 1; fit it again"
            )
        width = tensors["mean"].shape[-1]
        for name, shape in _SHAPES.items():
            expected = tuple(size or width for size in shape)
            if tuple(tensors[name].shape) != expected:
                raise DecisionError(
                    f"{folder / _TENSORS}: {name} is {tuple(tensors[name].shape)}, not {expected}"
                )
        if heads is not None and record["heads"] != heads:
            raise DecisionError(
                f"the decision model in {folder} was fitted on heads {record['heads']}, but the "
                f"current heads are {heads}: fit it again, or use what it was fitted on"
            )
        fields: dict[str, Any] = {**tensors, **record}
        return cls(**fields)


_SHAPES: dict[str, tuple[int, ...]] = {"weight": (2, 0), "bias": (2,), "mean": (0,), "scale": (0,)}
_SCALARS = ("slope", "offset", "threshold", "img_tokens", "use_similarity", "heads")


def decision_features(
    hidden: Float[Tensor, "N r e"],
    similarity: Float[Tensor, " N"] | None,
    img_tokens: str,
    use_similarity: bool,
) -> Float32[Tensor, "N f"]:
    """What the classifier reads, on the CPU: f is e or r e, and one more with the similarity.

    DecisionError where the similarity is to be read and is None.
    """
    read = hidden[:, 0] if img_tokens == "first" else hidden.flatten(1)
    columns = [read.detach().float().cpu()]
    if use_similarity:
        if similarity is None:
            raise DecisionError("this decision model reads the highest cosine similarity: give it")
        columns.append(similarity.detach().float().cpu()[:, None])
    return torch.cat(columns, 1)
