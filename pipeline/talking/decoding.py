"""Text and images out, token by token, in a context of the language model.

Letters: B rows, T positions of a prompt, V frozen output rows, C = V + 1 candidates for the next
token (the frozen rows and [IMG1]), e language-model width,
r [IMG] tokens. The token ids of an answer are those of the tokenizer below V, and V .. V+r-1 for
[IMG1] .. [IMGr].

Only [IMG1] is ever chosen by the model; [IMG2..r] follow it by force and are read in the same pass
of the language model, whose hidden states at the r positions are what GILL retrieves and generates
from (section 3.3 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gill_errors import InputError
from pipeline.bridge.heads import HeadSizes
from pipeline.bridge.image_tokens import append_image_logits, image_token_ids
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.devices import sent, sent_together
from pipeline.settings import ReadBack
from pipeline.talking.context import Context
from pipeline.talking.sampling import draw_tokens, penalise_presence, penalise_repetition
from pipeline.talking.sentences import ends_sentence
from pipeline.talking.spelling import Spelling

EndReason = Literal[
    "stop", "max_tokens", "max_sentences", "max_images", "max_positions", "cancelled"
]
_TAIL = 6  # tokens that show whether a sentence has ended
ImageLogit = Callable[[Float[Tensor, " B"]], Float[Tensor, " B"]]


class DecodingSettings(BaseModel):
    """How an answer is decoded; the defaults are greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(
        default=32, ge=1, description="longest answer; an image counts as one token"
    )
    finish_sentence: int = Field(
        default=0,
        ge=0,
        description="tokens by which an answer may be longer than max_tokens so as to end with a "
        "sentence",
    )
    max_sentences: int | None = Field(
        default=None,
        ge=1,
        description="most sentences of one answer, which ends behind the image of the last one, "
        "where one comes",
    )
    max_images: int = Field(default=1, ge=0, description="most images in one answer")
    words_between_images: bool = Field(
        default=False,
        description="no image stands directly behind another, and for all but the first of an "
        "answer image_bias counts behind the end of a sentence only",
    )
    read_back: ReadBack = Field(
        default="image_tokens",
        description="what is read in place of an image as the answer goes on. image_tokens: its r "
        "[IMG] tokens, as released; they are forgotten with the end of the answer. nothing: the "
        "words alone. picture: the k visual vectors of what was shown, also in later turns. "
        "image_tokens_and_picture: both",
    )
    min_tokens_before_image: int = Field(
        default=0, ge=0, description="text tokens of this answer before its first image is allowed"
    )
    image_bias: float = Field(
        default=0.0,
        ge=-1e6,
        le=1e6,
        description="added to the logit of [IMG1]; 1e4 makes an image come as soon as it may",
    )
    image_choice: Literal["likeliest", "majority"] = Field(
        default="likeliest",
        description="where a greedy answer has an image. likeliest: where [IMG1] is likelier than "
        "every other token, as released; majority: than all of them together",
    )
    temperature: float = Field(
        default=0.0, ge=0, le=100, description="0 is greedy, 1 samples the model's own odds"
    )
    top_k: int | None = Field(
        default=None, ge=1, description="sample among the k likeliest tokens only"
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample among the fewest tokens that hold this probability",
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=1,
        le=1000,
        description="divides the odds of text tokens already in this answer (CTRL's)",
    )
    presence_penalty: float = Field(
        default=0.0,
        ge=-100,
        le=100,
        description="taken off the logit of text tokens already in this answer",
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-100, le=100, description="the same, for every time that they are in it"
    )
    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        default=(),
        max_length=16,
        description="texts that end the answer before them, where they come without a picture in "
        "them",
    )
    stop_at_newline: bool = Field(
        default=False,
        description="end the answer before a line break, unless it begins with it (39 of UPSTREAM)",
    )
    stop_after_images: bool = Field(
        default=False,
        description="end the answer with its last image (max_images). Captions end with [IMG] in "
        "training, so the words behind one are the model's weakest",
    )


@dataclass(frozen=True)
class TextPiece:
    """Some text of row `row`: whole characters, and the token ids behind them."""

    row: int
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ImagePiece:
    """An image of row `row`: the language model's hidden states at [IMG1..r]."""

    row: int
    hidden: Float[Tensor, "r e"]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class EndPiece:
    """The end of row `row`: a stop token, enough said, no position left, or the caller's wish."""

    row: int
    reason: EndReason


@dataclass(frozen=True)
class WaitPiece:
    """All rows that go on read back an image that `shown` does not give yet."""


Piece = TextPiece | ImagePiece | EndPiece | WaitPiece
Shown = Callable[[int], Float[Tensor, "k e"] | None]


@dataclass(frozen=True, eq=False)
class Answer:
    """One row's answer: text and images in their order, and why it ended."""

    pieces: tuple[TextPiece | ImagePiece, ...]
    end: EndReason

    @property
    def token_ids(self) -> list[int]:
        """Ids of the whole answer, those of [IMG] tokens included."""
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def images(self) -> list[ImagePiece]:
        """The pictures of the answer, in order."""
        return [piece for piece in self.pieces if isinstance(piece, ImagePiece)]

    @property
    def text(self) -> str:
        """The text without the images."""
        return "".join(piece.text for piece in self.pieces if isinstance(piece, TextPiece))


def decode(
    model: MultimodalLanguageModel,
    context: Context,
    prompts: Sequence[Float[Tensor, "_ e"]],
    settings: DecodingSettings | Sequence[DecodingSettings],
    *,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    image_logit: ImageLogit | None = None,
) -> list[Answer]:
    """The whole answers of `stream`, one per row.

    >>> context = Context(model.language_model)
    >>> [answer] = decode(model, context, [prompt], DecodingSettings(max_tokens=32))
    >>> answer.text, [image.hidden for image in answer.images]
    """
    pieces: list[list[TextPiece | ImagePiece]] = [[] for _ in prompts]
    ends: dict[int, EndPiece] = {}
    for piece in stream(
        model,
        context,
        prompts,
        settings,
        seeds=seeds,
        stop_ids=stop_ids,
        image_logit=image_logit,
    ):
        if isinstance(piece, EndPiece):
            ends[piece.row] = piece
            continue
        assert not isinstance(piece, WaitPiece), "nothing is waited for without `shown`"
        own = pieces[piece.row]
        last = own[-1] if own else None
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            own[-1] = TextPiece(piece.row, last.text + piece.text, last.token_ids + piece.token_ids)
        else:
            own.append(piece)
    return [Answer(tuple(own), ends[row].reason) for row, own in enumerate(pieces)]


@torch.no_grad()
def stream(
    model: MultimodalLanguageModel,
    context: Context,
    prompts: Sequence[Float[Tensor, "_ e"]],
    settings: DecodingSettings | Sequence[DecodingSettings],
    *,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    image_logit: ImageLogit | None = None,
    cancelled: Callable[[int], bool] | None = None,
    shown: Shown | None = None,
) -> Iterator[Piece]:
    """Continue every row of `context` with its prompt, and yield the answers as they come.

    `prompts`: one [T, e] per row, words and visual tokens already embedded; T differs freely, and
    may be 0 in a context that has been read before. The context afterwards holds prompt and answer
    (not the stop token, but the tokens of a stop text), so that the next turn only adds its own.
    `settings`: for all rows, or one per row.
    `seeds`: one per row, needed when the temperature is not 0; a row's answer depends on its own
    seed and never on the rest of the batch.
    `stop_ids`: tokens that end an answer and are not part of it; default: the language model's. The
    released code stops at none: pass ().
    `image_logit`: replaces the logit [B] of [IMG1], before `settings.image_bias` is added; see
    `released_image_logit`.
    `cancelled(row)` is asked before every token; a row of which it is true ends there.
    `shown(row)`, needed where `settings.read_back` reads pictures: the visual vectors of the row's
    last image, or None while there are none yet; then the other rows go on, and WaitPiece comes
    when all wait.

    Raises ValueError for an empty prompt in a fresh row, a prompt beyond the last position, or
    missing seeds.
    """
    if isinstance(settings, DecodingSettings):
        settings = [settings] * len(prompts)
    _check_request(context, prompts, settings, seeds, shown)
    with context.by_token():
        yield from _pieces(
            model, context, prompts, settings, seeds, stop_ids, image_logit, cancelled, shown
        )


def _pieces(
    model: MultimodalLanguageModel,
    context: Context,
    prompts: Sequence[Float[Tensor, "_ e"]],
    settings: Sequence[DecodingSettings],
    seeds: Sequence[int] | None,
    stop_ids: Sequence[int] | None,
    image_logit: ImageLogit | None,
    cancelled: Callable[[int], bool] | None,
    shown: Shown | None,
) -> Iterator[Piece]:
    """Those of `stream`."""
    language_model, tokenizer = model.language_model, model.language_model.tokenizer
    if stop_ids is None:
        stop_ids = language_model.stop_ids
    image_embeddings = model.heads.image_embeddings
    image_ids = tuple(image_token_ids(language_model.num_rows, len(image_embeddings)))
    image_id = image_ids[0]
    rows = [
        _Row(
            index,
            None if seeds is None else torch.Generator().manual_seed(seeds[index]),
            one,
            Spelling(tokenizer, one.stop),
        )
        for index, one in enumerate(settings)
    ]
    for row, prompt in zip(rows, prompts):
        context.note(row.index, prompt)
    context.read()

    while active := [row for row in rows if row.reason is None]:
        for row in active:
            if cancelled is not None and cancelled(row.index):
                row.reason = "cancelled"
                yield EndPiece(row.index, row.reason)
        active = [row for row in active if row.reason is None]
        if not active:
            return
        if any(row.awaits_picture for row in active):
            assert shown is not None
            for row in active:
                if row.awaits_picture and (vectors := shown(row.index)) is not None:
                    context.note(row.index, vectors)
                    row.awaits_picture = False
            context.read()
            active = [row for row in active if not row.awaits_picture]
            if not active:
                yield WaitPiece()
                continue
        hidden = context.last_hidden
        if len(active) < len(rows):
            [going_on] = sent_together([[row.index for row in active]], hidden.device)
            hidden = hidden.index_select(0, going_on)
        logits = next_logits(model, hidden)
        if image_logit is not None:
            logits[:, image_id] = image_logit(logits[:, image_id])
        allowed = [_image_allowed(row, context, model) for row in active]
        bias = torch.tensor(
            [row.image_bias if may else -torch.inf for row, may in zip(active, allowed)],
            dtype=logits.dtype,
        )
        logits[:, image_id] += sent(bias, logits.device)
        for i, row in enumerate(active):
            one = row.settings
            penalise_repetition(logits[i], row.text_ids, one.repetition_penalty)
            penalise_presence(logits[i], row.text_ids, one.presence_penalty, one.frequency_penalty)
        chosen = _choose(logits, active)
        # In one copy for all rows; [IMG1] is no word and looks up another.
        words = [token if token != image_id else 0 for token in chosen]
        embedded = language_model.embed(sent(torch.tensor(words), logits.device))

        with_image = []
        for i, (row, token) in enumerate(zip(active, chosen)):
            if token in stop_ids or row.ends_line(token, tokenizer):
                row.reason = "stop"
                continue
            if token != image_id and row.num_sentences == row.settings.max_sentences:
                row.reason = "max_sentences"
                continue
            if token == image_id:
                context.note(row.index, image_embeddings)
                row.num_images += 1
                row.before_image = hidden[i].clone()
                row.words_since_image = False
                with_image.append(row)
            else:
                context.note(row.index, embedded[i : i + 1])
                row.text_ids.append(token)
                row.spelling.add(token)
                row.hear(tokenizer)
            row.num_tokens += 1
            if row.num_tokens >= row.settings.max_tokens and not row.may_finish_sentence:
                row.reason = "max_tokens"
            elif row.ends_with_image(token == image_id):
                row.reason = "max_images"
            elif context.room(row.index) == 0:
                row.reason = "max_positions"

        for row in active:
            if piece := row.show(flush=row.reason is not None or row in with_image):
                yield piece
            if row.spelling.stopped:
                row.reason = "stop"
        # The very last text tokens need no pass of their own; an image needs its hidden states.
        states = None
        if with_image or any(row.reason is None for row in active):
            states = context.read()
        for row in active:
            if row in with_image:
                assert states is not None
                hidden_states = states[row.index, -len(image_ids) :].clone()
                if row.settings.read_back in ("nothing", "picture"):
                    context.drop(row.index, len(image_ids), row.before_image)
                row.awaits_picture = row.settings.read_back.endswith("picture")
                yield ImagePiece(row.index, hidden_states, image_ids)
            if row.reason is not None:
                yield EndPiece(row.index, row.reason)


def released_image_logit(
    ret_scale_factor: float = 1.0, gen_scale_factor: float = 1.0
) -> ImageLogit:
    """What the released code does to the logit of [IMG1]: |logit| times each factor above 1.

    Its two factors act on the same token and so multiply (UPSTREAM 35). A magnitude turns an
    unlikely image into a likely one, which is why `image_bias` is the setting of this project.
    """

    def adjust(logit: Float[Tensor, B]) -> Float[Tensor, B]:
        for factor in (ret_scale_factor, gen_scale_factor):
            if factor > 1:
                logit = logit.abs() * factor
        return logit

    return adjust


@dataclass(eq=False)
class _Row:
    """One row of a batch while its answer is being decoded."""

    index: int
    generator: torch.Generator | None
    settings: DecodingSettings
    spelling: Spelling
    num_tokens: int = 0
    num_images: int = 0
    num_sentences: int = 0
    in_sentence: bool = False
    words_since_image: bool = False
    before_image: Tensor = field(default_factory=lambda: torch.zeros(0))
    """The hidden state from which the last image was chosen."""
    awaits_picture: bool = False
    text_ids: list[int] = field(default_factory=list)
    reason: EndReason | None = None

    def hear(self, tokenizer: Any) -> None:
        """Take note of where a sentence begins and ends."""
        self.words_since_image = True
        one = self.settings
        if not (one.finish_sentence or one.max_sentences or one.max_images > 1):
            return
        tail = tokenizer.decode(self.text_ids[-_TAIL:], clean_up_tokenization_spaces=False)
        if not ends_sentence(tail):
            self.in_sentence |= any(map(str.isalnum, tokenizer.decode(self.text_ids[-1:])))
        elif self.in_sentence:
            self.in_sentence = False
            self.num_sentences += 1

    @property
    def image_bias(self) -> float:
        """What is added to the logit of [IMG1] here."""
        one = self.settings
        in_place = not (one.words_between_images and self.num_images and self.in_sentence)
        return one.image_bias if in_place else min(one.image_bias, 0.0)

    @property
    def may_finish_sentence(self) -> bool:
        """Whether the answer, which is long enough, goes on to the end of its sentence."""
        one = self.settings
        return self.in_sentence and self.num_tokens < one.max_tokens + one.finish_sentence

    def ends_line(self, token: int, tokenizer: Any) -> bool:
        """Whether `token` is a line break at which the answer is to stop."""
        wanted = self.settings.stop_at_newline and self.num_tokens > 0
        return wanted and "\n" in tokenizer.decode([token])

    def ends_with_image(self, image: bool) -> bool:
        """Whether the answer is to stop after what was just said, an image or not."""
        enough = self.num_images == self.settings.max_images
        return image and enough and self.settings.stop_after_images

    def show(self, *, flush: bool) -> TextPiece | None:
        """The text not shown yet; see `Spelling.take`."""
        taken = self.spelling.take(flush=flush)
        return None if taken is None else TextPiece(self.index, *taken)


def _check_request(
    context: Context,
    prompts: Sequence[Tensor],
    settings: Sequence[DecodingSettings],
    seeds: Sequence[int] | None,
    shown: Shown | None,
) -> None:
    if len(prompts) != context.num_rows:
        raise InputError(f"{len(prompts)} prompts for a context of {context.num_rows} rows")
    if len(settings) != len(prompts):
        raise InputError(f"{len(settings)} settings for {len(prompts)} prompts")
    for row, prompt in enumerate(prompts):
        if len(prompt) + context.lengths[row] == 0:
            raise InputError(f"row {row}: the prompt is empty and nothing was read before it")
    if shown is None and any(one.read_back.endswith("picture") for one in settings):
        raise InputError("read_back: to read pictures back takes `shown`, which gives them")
    temperature = max((one.temperature for one in settings), default=0.0)
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise InputError(
            f"temperature {temperature} samples and needs one seed per row: "
            f"{len(prompts)} rows, {0 if seeds is None else len(seeds)} seeds"
        )


def next_logits(
    model: MultimodalLanguageModel, hidden: Float[Tensor, "B e"]
) -> Float[Tensor, "B C"]:
    """Logits of the V frozen rows and of [IMG1], float32."""
    words = model.language_model.logits(hidden)
    return append_image_logits(words, hidden, model.heads.image_embeddings[:1]).float()


def _image_allowed(row: _Row, context: Context, model: MultimodalLanguageModel) -> bool:
    one, sizes = row.settings, model.heads.sizes
    # A word fits behind it.
    standing = standing_positions(one.read_back, sizes) if one.read_back.endswith("picture") else 0
    return (
        row.num_images < one.max_images
        and len(row.text_ids) >= one.min_tokens_before_image
        and (row.words_since_image or row.num_images == 0 or not one.words_between_images)
        and context.room(row.index) >= max(sizes.r, standing + 1)
    )


def standing_positions(read_back: ReadBack, sizes: HeadSizes) -> int:
    """Positions that an image takes as the answer goes on."""
    tokens = sizes.r if read_back.startswith("image_tokens") else 0
    return tokens + (sizes.k if read_back.endswith("picture") else 0)


def _choose(logits: Float[Tensor, "B C"], rows: Sequence[_Row]) -> list[int]:
    """The next token of each row: the likeliest, or drawn with the row's own generator.

    Whether an image comes or words is one question, which word another: where many words are
    possible [IMG1] may be likelier than each of them, and yet less likely than that a word comes.
    """
    chosen = logits.argmax(dim=-1).tolist()
    image_id = logits.shape[1] - 1
    unsure = [
        i
        for i, row in enumerate(rows)
        if chosen[i] == image_id and row.settings.image_choice == "majority"
    ]
    if unsure:
        words, image = logits[unsure].split([image_id, 1], dim=1)
        outweighed = words.logsumexp(dim=1) >= image[:, 0]
        for i, is_word, word in zip(unsure, outweighed.tolist(), words.argmax(dim=1).tolist()):
            if is_word:
                chosen[i] = word
    alike: dict[tuple[float, int | None, float], list[int]] = {}
    for i, row in enumerate(rows):
        one = row.settings
        if one.temperature > 0:
            alike.setdefault((one.temperature, one.top_k, one.top_p), []).append(i)
    for (temperature, top_k, top_p), members in alike.items():
        generators = [rows[i].generator for i in members]
        drawn = draw_tokens(logits[members], temperature, top_k, top_p, generators)
        for i, token in zip(members, drawn):
            chosen[i] = token
    return chosen
