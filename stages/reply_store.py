"""How the frozen chat model's own answers to training questions are made."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from corpora.caption_table import CaptionTable
from corpora.chat_requests import (
    joined_with,
    own_questions,
    phrasings,
    read_part,
)
from gill_errors import StageError
from gill_files import force_to_disk
from gill_progress import Ticker
from pipeline.devices import set_up
from pipeline.frozen.backbones import Backbone
from pipeline.frozen.language_model import LanguageModel, load_language_model
from pipeline.frozen.turns import Message
from pipeline.talking.own_words import own_words
from settings.params import RunParams
from settings.replies import OWN_QUESTIONS, RepliesParams
from stages.reply_file import Reply, Request, as_line, read_replies

_BATCH = 16
"""Questions that are answered at once."""


def training_requests(params: RepliesParams, table: CaptionTable) -> list[Request]:
    """All that is answered: every question, and some of them together with a caption.

    Raises:
        CorpusError: there is no question in the user's file.
        StageError: no training row to ask for.
    """
    if params.questions == OWN_QUESTIONS:
        questions = own_questions("train")
    else:
        questions = read_part(params.questions, "train", params.held_out)
    requests = [Request(question) for question in questions]
    rows = table.rows_of_split("train")
    if params.joined and not len(rows):
        raise StageError(
            "training.replies.joined asks for pictures of training rows, and there are none"
        )
    ways = phrasings("train").joined
    draws = random.Random(f"replies {params.seed}")
    for number in range(params.joined):
        row = int(rows[draws.randrange(len(rows))])
        question, phrasing = questions[number % len(questions)], draws.choice(ways)
        [caption] = table.captions(np.array([row]))
        requests.append(Request(joined_with(phrasing, question, caption), row))
    return requests


def make_replies(
    file: Path, params: RepliesParams, table: CaptionTable, backbone: Backbone, run: RunParams
) -> list[Reply]:
    """Answer every request into `file`; what a killed run has answered is kept."""
    requests = training_requests(params, table)
    unfinished = file.with_name("unfinished.jsonl")
    done = _whole_lines(unfinished)
    if done < len(requests):
        device = set_up(run.device, run.threads)
        language_model = load_language_model(
            backbone.path,
            dtype=backbone.torch_dtype,
            device=device,
            quantization=backbone.quantization,
            chat=backbone.chat,
        )
        with Ticker("replies", unit="replies") as ticker, unfinished.open("a") as lines:
            begin = done
            for start in range(done, len(requests), _BATCH):
                part = requests[start : start + _BATCH]
                replies = answer(language_model, part, params.max_tokens)
                for reply in replies:
                    text = language_model.tokenizer.decode(reply.ids)
                    lines.write(as_line(reply, text) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
                ticker.count(start + len(part) - begin, len(requests) - begin)
    unfinished.rename(file)
    force_to_disk(file.parent)
    return read_replies(file)


def answer(
    language_model: LanguageModel, requests: Sequence[Request], max_tokens: int
) -> list[Reply]:
    """The frozen model's own answers, in one batch."""
    turns = language_model.turns
    assert turns is not None
    prompts = []
    for request in requests:
        written = turns.write([Message(said.role, (said.text,)) for said in request.messages])
        prompts.append([id_ for ids in written for id_ in cast("tuple[int, ...]", ids)])
    words = own_words(language_model, prompts, max_tokens)
    return [Reply(r, said.ids, said.ended) for r, said in zip(requests, words, strict=True)]


def _whole_lines(file: Path) -> int:
    """Lines that are whole; a last one that a kill cut short is taken away."""
    if not file.exists():
        return 0
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as lines:
            lines.truncate(len(whole))
    return whole.count(b"\n")
