"""The multimodal language model: the frozen language model with the trained heads around it.

Three things the model does, one method each: `caption` reads pictures and predicts text,
`image_tokens` reads captions and predicts [IMG] tokens for training, `image_hidden` reads any
interleaved context and returns the [IMG] hidden states.

Legend: B batch, k visual tokens, r [IMG] tokens, e language-model width, P supervised positions,
n frozen vocabulary rows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from gill_errors import InputError
from pipeline.bridge.batch import CaptionBatch
from pipeline.bridge.heads import Heads
from pipeline.bridge.image_tokens import embed_with_image_tokens
from pipeline.bridge.losses import at_least_float32
from pipeline.bridge.streams import FILLED, Row, Stream, captioning_stream, image_streams
from pipeline.devices import groups_sent_together
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.language_model import LanguageModel
from pipeline.frozen.packing import Packing

if TYPE_CHECKING:
    from pipeline.frozen.denoiser import Denoiser  # diffusers is slow to import


@dataclass(frozen=True)
class Supervised:
    """Hidden states and the ids they are to predict; n + i stands for [IMG i+1]."""

    hidden: Float[Tensor, "P e"]
    targets: Int64[Tensor, " P"]


@dataclass(frozen=True)
class ImageTokens:
    """What the shared pass of retrieval and generation yields."""

    hidden: Float[Tensor, "B r e"]
    """Of the [IMG] tokens after each caption, in the order of the batch."""
    constant: Supervised
    """Predictions before the first [IMG1] of each row: no gradient reaches their hidden states."""
    dependent: Supervised | None
    """Predictions within the second captions of packed pairs; None where there are none."""


class MultimodalLanguageModel(nn.Module):
    """The frozen language model and the heads, which are moved to its device.

    `state_dict()` and `parameters()` hold the heads alone. Heads compute in the language model's
    dtype (autocast), whatever dtype their parameters are kept in; losses and normalisations in at
    least float32.

    Attributes:
        denoiser: the frozen generator's UNet, where the objective asks for its loss.

    Raises:
        ValueError: the heads' e is not the language model's width.
    """

    def __init__(self, language_model: LanguageModel, heads: Heads) -> None:
        super().__init__()
        if heads.sizes.e != language_model.width:
            raise InputError(
                f"heads made for e = {heads.sizes.e}, but the language model's embedding rows have "
                f"width {language_model.width}"
            )
        self.language_model = language_model  # a plain attribute: LanguageModel is no nn.Module
        self.denoiser: Denoiser | None = None  # likewise
        self.heads = heads.to(language_model.device)

    # --- heads -------------------------------------------------------------------------------

    def visual_prefix(self, pooled: Float[Tensor, "B d"]) -> Float[Tensor, "B k e"]:
        """v_phi(x)^T W_cap as k input vectors for the language model."""
        with self._compute():
            flat = self.heads.caption_projection(self._as_parameters(pooled))
        # [B, k * e] -> [B, k, e]: one linear map makes all k tokens (section 3.1).
        return flat.unflatten(1, (self.heads.sizes.k, -1)).to(self.language_model.dtype)

    def generation_embedding(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B L D"]:
        """f_omega: the [IMG] hidden states in the generator's text space, at least float32."""
        with self._compute():
            out = self.heads.mapper(self._states(hidden), self.heads.image_embeddings)
        return at_least_float32(out)

    def generation_pooled(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B D_pooled"]:
        """The pooled text vector that some generators need, from the mean [IMG] hidden state."""
        if self.heads.pooled_projection is None:
            raise InputError("these heads have no pooled projection: D_pooled is not set")
        with self._compute():
            out = self.heads.pooled_projection(self._states(hidden).mean(dim=1))
        return at_least_float32(out)

    @torch.no_grad()
    def conditioning(self, hidden: Float[Tensor, "B r e"], batch_size: int = 64) -> Conditioning:
        """What the frozen generator reads in place of its own text encoder's output."""
        has_pooled = self.heads.pooled_projection is not None
        return Conditioning.join(
            [
                Conditioning(
                    self.generation_embedding(part),
                    self.generation_pooled(part) if has_pooled else None,
                )
                for part in hidden.split(batch_size)
            ]
        )

    def text_query(self, hidden: Float[Tensor, "B r e"]) -> Float[Tensor, "B p"]:
        """The retrieval query: W_t2i on the hidden state of [IMG1], normalised."""
        with self._compute():
            out = self.heads.text_to_image(self._states(hidden[:, :1])[:, 0])
        return F.normalize(at_least_float32(out), dim=-1)

    def image_key(self, pooled: Float[Tensor, "B d"]) -> Float[Tensor, "B p"]:
        """What queries are compared with: W_i2t on the pooled visual vector, normalised."""
        with self._compute():
            out = self.heads.image_to_text(self._as_parameters(pooled))
        return F.normalize(at_least_float32(out), dim=-1)

    # --- passes ------------------------------------------------------------------------------

    def caption(
        self, batch: CaptionBatch, rows: Sequence[Row], supervise_start: bool
    ) -> Supervised:
        """Read `k + T` tokens per caption and predict it (Eq. 1). See `captioning_stream`."""
        start_ids, k = self.language_model.start_ids, self.heads.sizes.k
        stream = captioning_stream(batch.lengths, rows, k, len(start_ids), supervise_start)
        words = self.words(batch.tokens)
        none_before = [0] * len(stream.lengths)
        own, sequences = groups_sent_together(
            [Places.lists(stream), Packing.lists(stream.lengths, none_before, words.device)],
            words.device,
        )
        places = Places(*own)
        # [B * k, e], in the order of the stream's filled places.
        visual = self.visual_prefix(batch.pooled).flatten(0, 1)
        inputs = self.inputs(places, words, visual)
        packing = Packing.of(stream.lengths, inputs.device, sent=sequences)
        return places.supervised(words, self.language_model.hidden_states(inputs, packing))

    def image_tokens(
        self,
        batch: CaptionBatch,
        rows: Sequence[Row],
        supervise_captions: bool,
        supervise_second: bool,
    ) -> ImageTokens:
        """Read captions with their [IMG] tokens; retrieval and generation share this one pass.

        What precedes the first [IMG1] of a row depends on nothing trainable: it is read without
        gradient, and only its keys and values go on. See `image_streams`.
        """
        model, r = self.language_model, self.heads.sizes.r
        streams = image_streams(
            batch.lengths, rows, r, len(model.start_ids), supervise_captions, supervise_second
        )
        words = self.words(batch.tokens)
        # Read once per model; for the rows its keys are repeated as views, not copies.
        start = model.read_start()
        begun = [0 if start is None else len(start.hidden)] * len(rows)
        read = [a + b for a, b in zip(begun, streams.prefix.lengths, strict=True)]
        # Both passes in one copy, before the first.
        *places, before_first, before_second = groups_sent_together(
            [
                Places.lists(streams.prefix),
                Places.lists(streams.suffix),
                Packing.lists(streams.prefix.lengths, begun, words.device),
                Packing.lists(streams.suffix.lengths, read, words.device),
            ],
            words.device,
        )
        constant, dependent = (Places(*lists) for lists in places)
        with torch.no_grad():
            inputs = self.inputs(constant, words, None)
            packing = Packing.of(
                streams.prefix.lengths,
                inputs.device,
                prefix=None if start is None else start.prefix.repeat(len(rows)),
                record=True,
                sent=before_first,
            )
            before = model.hidden_states(inputs, packing)
            if start is not None:
                # Place 0 of the predictors is the last start id; the stream's own count from 1.
                before = torch.cat([start.hidden[-1:], before])
        # One row of E_img per use, in E_img's own dtype: their gradients are summed in that dtype.
        # [r, e] -> [B * r, e], one copy after each caption.
        images = self.heads.image_embeddings.expand(len(batch), -1, -1).flatten(0, 1)
        inputs = self.inputs(dependent, words, images.to(model.dtype))
        # The recorded keys and values are constants: the backward pass ends at E_img's places.
        after = Packing.of(
            streams.suffix.lengths, inputs.device, prefix=packing.recorded, sent=before_second
        )
        hidden = model.hidden_states(inputs, after)
        # [S, e] -> [B * r, e] -> [B, r, e]: the r [IMG] states of each caption, in order.
        return ImageTokens(
            hidden=hidden.index_select(0, dependent.filled).unflatten(0, (len(batch), r)),
            constant=constant.supervised(words, before),
            dependent=dependent.supervised(words, hidden) if streams.suffix.targets else None,
        )

    def image_hidden(
        self, contexts: Sequence[Sequence[Num[Tensor, "..."]]]
    ) -> Float[Tensor, "B r e"]:
        """Hidden states of [IMG1..r] after each of B contexts, all in one packed pass.

        A context is a list of parts: int64 ids [T] (start ids are the caller's; ids from n on are
        [IMG] tokens) and visual prefixes [k, e], in reading order.

        >>> parts = [torch.tensor([2, 88, 91]), model.visual_prefix(pooled)[0]]
        >>> hidden = model.image_hidden([parts])

        Raises:
            ValueError: a context with its [IMG] tokens is longer than the model's positions.
        """
        model, images = self.language_model, self.heads.image_embeddings
        pieces: list[Tensor] = []
        lengths: list[int] = []
        for context in contexts:
            read = [
                part.to(model.device, model.dtype)
                # Vectors are inputs already; integers are ids.
                if part.is_floating_point()
                else embed_with_image_tokens(part.to(model.device), model, images)
                for part in context
            ]
            pieces += [*read, images.to(model.dtype)]
            lengths.append(sum(map(len, read)) + len(images))
        hidden = model.hidden_states(torch.cat(pieces), Packing.of(lengths, model.device))
        # [B] ends in the packed stream, [B, r] places: the last r of each context.
        ends = torch.tensor(lengths).cumsum(0)
        places = ends[:, None] + torch.arange(-len(images), 0)
        return hidden[places.to(hidden.device)]

    # --- details -----------------------------------------------------------------------------

    def _compute(self) -> AbstractContextManager:
        model = self.language_model
        if model.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(model.device.type, dtype=model.dtype)

    def _as_parameters(self, x: Tensor) -> Tensor:
        """`x` in the heads' own dtype; autocast takes it from there."""
        return x.to(self.heads.image_embeddings.dtype)

    def _states(self, hidden: Float[Tensor, "B n e"]) -> Float[Tensor, "B n e"]:
        return self.heads.standardized(self._as_parameters(hidden))

    def words(self, tokens: Int64[Tensor, " S"]) -> Int64[Tensor, " words"]:
        """Start ids, the tokens of all texts, and the id of [IMG1], as streams index them."""
        model = self.language_model
        # On a device the check would wait for it; there the embedding itself refuses most such ids.
        highest = int(tokens.max()) if len(tokens) and tokens.device.type == "cpu" else 0
        if highest >= model.num_rows:
            raise InputError(
                f"a text holds token {highest}, but the frozen vocabulary ends at "
                f"{model.num_rows - 1}: the texts were tokenized with another tokenizer"
            )
        # Filled on the device, not copied there.
        start = [tokens.new_full((1,), id) for id in model.start_ids]
        image = tokens.new_full((1,), model.num_rows)
        return torch.cat([*start, tokens, image]).to(model.device)

    def inputs(
        self,
        places: "Places",
        words: Int64[Tensor, " words"],
        filling: Float[Tensor, "F e"] | None,
    ) -> Float[Tensor, "S e"]:
        """Embed a stream; `filling` goes to its filled places."""
        with torch.no_grad():
            inputs = self.language_model.embed(words[places.source])
        if filling is None:
            return inputs
        # Out of place, so that the gradient reaches `filling` and nothing else.
        return inputs.index_copy(0, places.filled, filling.to(inputs.dtype))


@dataclass(frozen=True)
class Places:
    """A `Stream` on the device of its words."""

    source: Int64[Tensor, " S"]
    """Which word; 0, to be overwritten, at a filled place."""
    filled: Int64[Tensor, " F"]
    predictors: Int64[Tensor, " P"]
    targets: Int64[Tensor, " P"]

    @staticmethod
    def lists(stream: Stream) -> list[Sequence[int] | Int64[Tensor, " _"]]:
        """The fields, in their order, still on the CPU: to be sent with others in one copy."""
        source = torch.tensor(stream.source, dtype=torch.int64)
        source = source.masked_fill(source == FILLED, 0)
        return [source, stream.filled, stream.predictors, stream.targets]

    def supervised(
        self, words: Int64[Tensor, " words"], hidden: Float[Tensor, "S e"]
    ) -> Supervised:
        """The hidden states that predict, with the ids of their targets."""
        return Supervised(hidden.index_select(0, self.predictors), words[self.targets])
