"""Everything that is trained, and nothing that is frozen."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from gill_errors import InputError
from gill_records import Record
from pipeline.bridge.mapper import MAPPERS
from pipeline.settings import MapperSizes

if TYPE_CHECKING:
    from pipeline.frozen.language_model import LanguageModel


class HeadSizes(Record):
    """Widths of the trained parts; the letters are the paper's."""

    d: int = Field(gt=0, description="width of the visual encoder's pooled vector")
    e: int = Field(gt=0, description="width of the language model's embedding rows")
    k: int = Field(default=4, ge=1, description="visual tokens per image")
    r: int = Field(default=8, ge=1, description="[IMG] tokens per image")
    L: int = Field(
        default=77, ge=1, description="text positions of the image generator = learnt queries"
    )
    D: int = Field(default=768, ge=1, description="text width of the image generator")
    m: int = Field(default=512, ge=1, description="width of the mapping network")
    p: int = Field(default=256, ge=1, description="width of the retrieval space")
    D_pooled: int | None = Field(
        default=None,
        ge=1,
        description="width of the pooled text vector, for generators that need one",
    )
    mapper: MapperSizes = Field(default_factory=MapperSizes, description="the mapping network")
    standardizes_states: bool = Field(
        default=False, description="[IMG] hidden states are standardised before they are read"
    )


class Heads(nn.Module):
    """`E_img`, `W_cap`, `W_t2i`, `W_i2t`, the temperature and the mapper: 50.1 M in the paper.

    All linear maps have a bias, as released (UPSTREAM 15). Initialisation is torch's own for linear
    maps; `logit_scale` starts at log(1/0.07) (UPSTREAM 8); `E_img` as N(0, 0.02^2), to be replaced
    by `mean_image_embeddings` or `word_image_embeddings` once the language model is known.
    """

    state_mean: Tensor
    state_deviation: Tensor

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        self.sizes = s = sizes
        # In another order the same seed would start them elsewhere: all draw from one generator,
        # and what no r or mapping network changes draws first, so that it starts alike in all.
        self.caption_projection = nn.Linear(s.d, s.k * s.e)
        self.text_to_image = nn.Linear(s.e, s.p)
        self.image_to_text = nn.Linear(s.d, s.p)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.mapper = MAPPERS[s.mapper.kind](s.e, s.r, s.L, s.D, s.m, s.mapper)
        self.pooled_projection = None if s.D_pooled is None else nn.Linear(s.e, s.D_pooled)
        self.image_embeddings = nn.Parameter(torch.randn(s.r, s.e) * 0.02)
        if s.standardizes_states:
            self.register_buffer("state_mean", torch.zeros(s.r, s.e))
            self.register_buffer("state_deviation", torch.ones(s.r, s.e))

    @torch.no_grad()
    def set_image_embeddings(self, rows: Float[Tensor, "r e"]) -> None:
        """Start `E_img` from `rows`."""
        self.image_embeddings.copy_(rows)

    @torch.no_grad()
    def standardize_by(self, states: Float[Tensor, "N r e"]) -> None:
        """Standardise as these [IMG] states need it, before the first step.

        Of a chat model's states some 98% of the variance are one constant, with single dimensions
        of 100 deviations, behind which mapper and W_t2i learn several times more slowly.
        """
        states = states.to(self.image_embeddings.dtype)
        deviation = states.std(0)
        self.state_mean.copy_(states.mean(0))
        # What hardly varies would be noise: it is stretched no further than this.
        self.state_deviation.copy_(deviation.clamp(min=0.3 * float(deviation.mean())))

    def standardized(self, hidden: Float[Tensor, "B n e"]) -> Float[Tensor, "B n e"]:
        """States of [IMG1..n] as mapper and W_t2i read them."""
        if not self.sizes.standardizes_states:
            return hidden
        count = hidden.shape[1]
        return (hidden - self.state_mean[:count]) / self.state_deviation[:count]


def mean_image_embeddings(
    language_model: "LanguageModel", r: int, generator: torch.Generator | None = None
) -> Float[Tensor, "r e"]:
    """r rows drawn around the mean of the frozen rows with their standard deviation, in float32.

    The paper does not say how `E_img` starts. The released code starts it from whatever rows the
    resized table holds at those ids (UPSTREAM 19), which depends on the checkpoint.
    """
    # Drawn on the CPU, so that a seed gives the same rows whatever the device. Rows of the table
    # that are no part of the softmax would shift the mean: they are left out.
    rows = language_model.input_rows[: language_model.num_rows].detach().float().cpu()
    noise = torch.randn(r, rows.shape[1], generator=generator)
    return rows.mean(0) + noise * rows.std(0)


def word_image_embeddings(
    language_model: "LanguageModel", r: int, texts: Sequence[str]
) -> Float[Tensor, "r e"]:
    """Row i is the mean of the embedding rows of the tokens of the i-th group of texts, in float32.

    The texts are cut into r neighbouring groups, as equal as can be (the first are the larger
    ones): whatever r is, the rows together stand for all of them.

    Raises:
        InputError: there are fewer than r texts, or one of them has no tokens.
    """
    if len(texts) < r:
        raise InputError(f"{len(texts)} texts; r = {r} [IMG] tokens need as many")
    ids = [language_model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for i, text in enumerate(texts):
        if not ids[i]:
            raise InputError(f"text {i + 1}, {text!r}, has no tokens: name a word")
    rows = []
    for group in torch.arange(len(texts)).tensor_split(r):
        tokens = [token for i in group.tolist() for token in ids[i]]
        rows.append(language_model.embed(torch.tensor(tokens)).detach().float().cpu().mean(0))
    return torch.stack(rows)
