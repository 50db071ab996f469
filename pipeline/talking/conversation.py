"""Interleaved in, interleaved out: turns of text and pictures, answered with text and pictures.

    ["how does this look at night ?", picture]  ->  [Text, GeneratedImage]

A picture comes into being where the language model produces [IMG1]: its r hidden states query the
candidate index (section 3.2), the decision model weighs retrieval against generation (section 3.3),
and the picture is fetched, or made by the frozen generator from GILLMapper's output.

What is remembered: the language model reads every turn once and keeps its keys and values, so that
a turn costs its own tokens only. When a turn and the longest answer it may get do not fit into the
language model's positions any more, whole exchanges (a turn with its answer) are forgotten, the
oldest first, until the kept ones take at most half of the positions that turn and answer leave;
these are then read again, once. `Started.forgotten_turns` and `Reply.forgotten_turns` say how many
went. Of an answer its words are remembered; what stands for its pictures `read_back` says: nothing,
unless the run or the turn says otherwise; then show a picture in the next turn to go on from it.
(The 100 held-out stories of the miniature world, told over five turns with two seeds, keep 0.75 of
the attributes that way and 0.71 with the generated pictures read back, each +- 0.02; the real
pictures read back give 0.92.) A turn whose answer was broken off (closed, cancelled, failed) is
forgotten as a whole.

Letters: r [IMG] tokens, e language-model width, n positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.bridge.heads import HeadSizes
from pipeline.talking.answers import (
    ContextLengthError,
    ConversationError,
    Event,
    Part,
    Reply,
    ReplySettings,
    SeenPart,
    Side,
    Started,
    ToldPart,
)
from pipeline.talking.batch import reply_together, stream_together
from pipeline.talking.context import Context
from pipeline.talking.decoding import DecodingSettings, standing_positions
from pipeline.talking.memory import ChatMemory, Heard, Memory, TextMemory
from pipeline.talking.prefixes import Prefixes
from pipeline.talking.reading import parts_of, refuse_broken_text
from pipeline.talking.speaker import Speaker

# Above any logit of a trained model: an image comes as soon as it is allowed.
CERTAIN = 1e4


@dataclass(frozen=True, eq=False)
class Turn:
    """A turn that was read and checked, ready to be answered. `cancelled` is asked as it runs."""

    conversation: Conversation
    heard: Heard
    settings: ReplySettings
    cancelled: Callable[[], bool] | None = None


class Conversation:
    """What was said so far. Not for several threads at once.

    >>> conversation = Conversation(speaker)
    >>> conversation.reply(["a red ring on the left."])
    [GeneratedImage(...), Text(" it turns blue.")]
    """

    def __init__(
        self,
        speaker: Speaker,
        prefixes: Prefixes | None = None,
        *,
        system_prompt: str | None = None,
    ) -> None:
        """`system_prompt`, of a chat model: instead of the one of the run.

        Raises ConversationError for a model that knows no turns, or no system prompt.
        """
        self.speaker, self._prefixes = speaker, prefixes
        self._memory = _new_memory(speaker, system_prompt)
        self.shown: list[int] = []
        """Rows already retrieved: they are not shown again."""
        self.num_generated = 0
        self.num_forgotten = 0
        """Turns that are not remembered."""
        self._forgotten_before = 0
        self._context: Context | None = Context(speaker.language_model)
        self._max_positions = self._context.max_positions
        self._inputs = torch.zeros(0, speaker.heads.sizes.e)
        self._busy = False
        self._pictures_before: tuple[list[int], int] = ([], 0)

    @property
    def num_turns(self) -> int:
        """Turns that are remembered."""
        return self._memory.num_turns

    @property
    def num_positions(self) -> int:
        """Positions that they take."""
        return self._memory.num_positions(self.speaker)

    def fork(self) -> Conversation:
        """A copy that goes its own way: what was read is copied, the models are shared."""
        speaker = self.speaker
        shared = (speaker, speaker.model, speaker.language_model, self._prefixes)
        return copy.deepcopy(self, {id(one): one for one in shared})

    def recall(self, exchange: Sequence[ToldPart]) -> None:
        """Remember a turn and its answer that were said elsewhere, as what was said last. Who says
        what (`Side`) counts for a chat model alone.

        What would leave a quarter of the language model's positions, or less, goes as it goes when
        a turn finds no room: the oldest first, until half of that is taken. So what is remembered
        of a growing history begins alike for many turns.
        """
        parts_of([part for part in exchange if not isinstance(part, Side)])
        if self._memory.recall(self.speaker, exchange):
            self._make_room(self._max_positions * 3 // 4)
            self._context = None

    def reply(
        self, turn: Sequence[SeenPart] | Part, settings: ReplySettings | None = None
    ) -> Reply:
        """The whole answer to one turn; see `stream`."""
        return reply_together([self.prepare(turn, settings)])[0]

    def stream(
        self, turn: Sequence[SeenPart] | Part, settings: ReplySettings | None = None
    ) -> Generator[Event, None, None]:
        """Answer one turn, event by event: Started, then words as they come, PictureProgress while
        a picture is being made, the picture, and Ended.

        Pictures are generated when all words are there, the words behind a picture come after it.
        Closing the stream breaks the answer off.

        Raises ConversationError as `prepare` does, when the first event is asked for.
        """
        for _, event in stream_together([self.prepare(turn, settings)]):
            yield event

    def prepare(
        self,
        turn: Sequence[SeenPart] | Part,
        settings: ReplySettings | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Turn:
        """Read a turn into vectors and check that it can be answered, for `stream_together`.

        Raises ConversationError for an empty turn, one that the language model's positions cannot
        hold, or a wanted kind of picture that cannot be had.
        """
        settings = self.speaker.reply_settings if settings is None else settings
        if not isinstance(settings, ReplySettings):
            raise ConversationError(f"settings are {settings!r:.60}, no ReplySettings")
        refuse_broken_text(settings.negative_prompt, "negative_prompt")
        settings = self._checked(settings)
        turn = parts_of(turn)
        heard = self._memory.hear(self.speaker, turn)
        if not len(heard.embeddings):
            raise ConversationError("the turn is empty: say something or show a picture")
        limit = self._max_positions - self._start()
        shortest = self.speaker.heads.sizes.r if settings.decoding.max_images else 1
        if len(heard.embeddings) + shortest > limit:
            raise ContextLengthError(
                f"the turn takes {len(heard.embeddings)} positions of the language model, which "
                f"has {limit} and needs {shortest} for the shortest answer: shorten the turn"
            )
        return Turn(self, heard, settings, cancelled)

    def _checked(self, settings: ReplySettings) -> ReplySettings:
        """The settings with what `want` means for decoding."""
        speaker, want, decoding = self.speaker, settings.want, settings.decoding
        if want == "retrieve" and speaker.index is None:
            raise ConversationError("nothing to retrieve from: there is no candidate index")
        if want == "generate" and speaker.generator is None:
            raise ConversationError("no image generator is loaded")
        if want == "auto" and speaker.index is None and speaker.generator is None:
            raise ConversationError("neither index nor generator is loaded: want text")
        if settings.negative_prompt and speaker.conditioner is None:
            raise ConversationError("no text encoder is there to read the negative prompt")
        changes: dict[str, Any] = {}
        if want == "text":
            changes["max_images"] = 0
        elif want != "auto":
            if decoding.max_images == 0:
                raise ConversationError(f"max_images is 0, but a picture is wanted ({want})")
            changes["image_bias"] = CERTAIN
        if want == "retrieve":
            assert speaker.index is not None
            left = len(speaker.index) - len(self.shown)
            if left < 1:
                raise ConversationError(
                    f"all {len(speaker.index)} candidate pictures were shown in this conversation"
                )
            changes["max_images"] = min(decoding.max_images, left)
        return settings.model_copy(
            update={
                "decoding": decoding.model_copy(update=changes),
                "generation": settings.generation or speaker.generation,
            }
        )

    def begin(self, turn: Turn) -> tuple[Context, Float[Tensor, "n e"], Started]:
        """The context to go on in, what to read next in it, and what that makes known."""
        if self._busy:
            raise ConversationError("this conversation is still answering its last turn")
        self._busy = True
        self._pictures_before = list(self.shown), self.num_generated
        speaker, decoding = self.speaker, turn.settings.decoding
        longest = _longest_answer(decoding, speaker.heads.sizes)
        heard = turn.heard
        free = self._max_positions - self._start() - len(heard.embeddings) - longest
        self._make_room(max(free, 0))
        forgotten = self.num_forgotten - self._forgotten_before
        self._forgotten_before = self.num_forgotten
        context, self._context = None if forgotten else self._context, None
        self._inputs = inputs = self._memory.inputs(speaker, heard)
        if context is not None and context.lengths[0]:
            left = self._memory.left_to_read(context, inputs, heard)
            return context, left, Started(len(left), forgotten)
        # The last position is read in any case: its hidden state is what the answer begins from.
        context = None if self._prefixes is None else self._prefixes.longest(inputs[:-1])
        context = context or Context(speaker.language_model)
        known = context.lengths[0]
        return context, inputs[known:], Started(len(inputs), forgotten, known)

    def _make_room(self, free: int) -> None:
        """Where more than `free` positions are taken, forget until half of them are."""
        if self.num_positions > free:
            while self.num_turns and self.num_positions > free // 2:
                self._memory.forget_oldest()
                self.num_forgotten += 1

    def finish(
        self,
        turn: Turn,
        context: Context,
        words: Float[Tensor, "n e"],
        told: Sequence[str | Tensor],
        ends_with_text: bool,
    ) -> None:
        """Remember the turn that was begun, with the words of its answer and what stands for its
        pictures: as vectors, and with words as text."""
        self._context = context
        read = self._memory.keep(turn.heard, self._inputs, words, told, ends_with_text)
        # Not a view, which would keep, and copy with a fork, all that it is of.
        self._inputs, self._busy = words.new_zeros(0, words.shape[1]), False
        if self._prefixes is not None:
            self._prefixes.keep(read, context)

    def _start(self) -> int:
        """Positions that stand before every turn, and are not counted with it."""
        return 0 if isinstance(self._memory, ChatMemory) else len(self.speaker.start())

    def abandon(self) -> None:
        """The turn that was begun was never said, nor a picture shown in it."""
        self.shown, self.num_generated = self._pictures_before
        self._busy = False


def _longest_answer(decoding: DecodingSettings, sizes: HeadSizes) -> int:
    """Positions that an answer may need: an image is one of its tokens, r while it is produced, and
    then what stands for it."""
    standing = standing_positions(decoding.read_back, sizes)
    produced = max(sizes.r - standing, 0) if decoding.max_images else 0
    images = decoding.max_images * (max(standing, 1) - 1)
    return decoding.max_tokens + decoding.finish_sentence + images + max(produced - 1, 0)


def _new_memory(speaker: Speaker, system_prompt: str | None) -> Memory:
    if speaker.language_model.turns is None:
        if system_prompt is not None:
            raise ConversationError(
                "this model continues texts and knows no system prompt (model.turns: plain)"
            )
        return TextMemory()
    memory = ChatMemory(system_prompt)
    if system_prompt is not None:
        memory.hear(speaker, ["a"])  # or its template refuses it
    return memory
