"""A conversation as it was sent, read: words, and pictures that are known to decode.

    exchanges (texts, addresses of pictures) -> within the limits -> files -> looked at -> Told

Every request tells the whole conversation. What is beyond the limits is forgotten, whole exchanges
and the oldest first; the turn that is to be answered must keep to them itself. Nothing that a
client names is fetched, unless the operator allows its host.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from app.page.kept_pictures import KeptPictures
from app.serving.data_uris import decode_data_uri, is_data_uri
from app.serving.request_errors import RequestError, refuse_broken
from app.serving.seen_pictures import SeenPictures
from app.serving.settings import RequestLimits
from corpora.pictures import PictureError
from pipeline.talking.answers import Side
from pipeline.talking.remote_pictures import (
    RemotePictureError,
    RemotePictureSettings,
    fetch_picture,
)

KEPT_PICTURE = re.compile(r"/v1/pictures/([A-Za-z0-9_-]{32})\.png$")
_FETCHES = 16
"""Pictures that are fetched at one time."""
_CHECKS = 2
"""Requests whose pictures are decoded at one time: this bounds memory, whatever their number."""

_TOO_LARGE = "image_too_large"


@dataclass(frozen=True, eq=False)
class PictureAddress:
    """A picture that a request shows, and the field that names it."""

    url: str
    where: str


SentPart = str | PictureAddress | Side
SeenSentPart = str | bytes | Tensor | Side


@dataclass(frozen=True, eq=False)
class Told:
    """Exchanges and the turn to answer. Pictures are the bytes of files, or vectors [d] of those
    that were encoded before; a `Side` says who says what is behind it."""

    history: list[list[SeenSentPart]]
    turn: list[SeenSentPart]
    forgotten: int
    """Oldest exchanges that are beyond the limits."""


class TurnReader:
    """Reads for one service."""

    def __init__(
        self,
        limits: RequestLimits,
        remote: RemotePictureSettings,
        kept: KeptPictures,
        seen: SeenPictures,
    ) -> None:
        self._limits, self._remote, self._kept, self._seen = limits, remote, kept, seen
        self._fetching = ThreadPoolExecutor(_FETCHES, "fetching")
        self._checking = asyncio.Semaphore(_CHECKS)

    async def read(self, exchanges: Sequence[Sequence[SentPart]]) -> Told:
        """Read all exchanges; the last is the turn to answer. RequestError names what is wrong."""
        *history, turn = exchanges
        kept = self._within_limits(history, turn)
        addresses = [p for part in (*kept, turn) for p in part if isinstance(p, PictureAddress)]
        if not addresses:
            return self._look(history, kept, turn, {})
        files = await asyncio.gather(*map(self._file, addresses))
        async with self._checking:
            return await asyncio.to_thread(
                self._look, history, kept, turn, dict(zip(addresses, files))
            )

    def _within_limits(
        self, history: Sequence[Sequence[SentPart]], turn: Sequence[SentPart]
    ) -> list[Sequence[SentPart]]:
        """The newest exchanges that are within the limits of letters and pictures."""
        limits = self._limits
        for text in (part for exchange in (*history, turn) for part in exchange):
            if isinstance(text, str):
                refuse_broken(text, "messages")
        characters, pictures = _size(turn)
        if characters > limits.max_characters:
            raise RequestError(
                f"{characters} characters in one turn, at most {limits.max_characters}",
                param="messages",
                code="context_length_exceeded",
            )
        if pictures > limits.max_pictures:
            raise RequestError(
                f"more than {limits.max_pictures} pictures in one turn",
                param="messages",
                code="too_many_pictures",
            )
        kept: list[Sequence[SentPart]] = []
        for exchange in reversed(history):
            more_characters, more_pictures = _size(exchange)
            characters, pictures = characters + more_characters, pictures + more_pictures
            if characters > limits.max_characters or pictures > limits.max_pictures:
                break
            kept.insert(0, exchange)
        return kept

    async def _file(self, picture: PictureAddress) -> bytes:
        """The bytes behind an address."""
        try:
            if is_data_uri(picture.url):
                return await asyncio.to_thread(decode_data_uri, picture.url)
            if name := KEPT_PICTURE.search(picture.url):
                file = self._kept.get(name[1])
                if file is not None:
                    return file
                raise ValueError("there is no such picture, or its name has expired")
            if not self._remote.allowed_hosts:
                raise ValueError(
                    "only data URIs are read here: addresses are not fetched (no host is allowed)"
                )
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._fetching, fetch_picture, picture.url, self._remote
            )
        except (ValueError, RemotePictureError) as error:
            raise RequestError(str(error), param=picture.where, code="invalid_image") from None

    def _look(
        self,
        history: Sequence[Sequence[SentPart]],
        kept: Sequence[Sequence[SentPart]],
        turn: Sequence[SentPart],
        files: dict[PictureAddress, bytes],
    ) -> Told:
        """Decode what was not seen before, to refuse what is broken; it is not kept decoded."""
        left = self._limits.max_pixels

        def look(exchange: Sequence[SentPart]) -> list[SeenSentPart]:
            nonlocal left
            parts: list[SeenSentPart] = []
            for part in exchange:
                if not isinstance(part, PictureAddress):
                    parts.append(part)
                    continue
                try:
                    seen = self._seen.look(files[part], max(left, 0))
                except PictureError as error:
                    code = _TOO_LARGE if error.kind == "too large" else "invalid_image"
                    reason = f"{error.kind}: {error.detail}"
                    raise RequestError(reason, param=part.where, code=code) from None
                left -= seen.pixels
                parts.append(files[part] if seen.vector is None else seen.vector)
            return parts

        answered = look(turn)
        read: list[list[SeenSentPart]] = []
        if all(isinstance(part, Side) for part in answered):
            reason = "the turn is empty: say something or show a picture"
            raise RequestError(reason, param="messages")
        for exchange in reversed(kept):
            try:
                read.insert(0, look(exchange))
            except RequestError as error:
                if error.code != _TOO_LARGE:
                    raise
                break
        return Told(read, answered, len(history) - len(read))


def _size(exchange: Sequence[SentPart]) -> tuple[int, int]:
    """Characters and pictures."""
    pictures = sum(isinstance(part, PictureAddress) for part in exchange)
    return sum(len(part) for part in exchange if isinstance(part, str)), pictures


def take_system_prompt(
    exchanges: Sequence[Sequence[SentPart]], limits: RequestLimits
) -> tuple[str | None, list[list[SentPart]]]:
    """What a conversation begins with as its system prompt, and the rest of it.

    Raises RequestError where there are pictures in it, or it is beyond the limits.
    """
    first, *others = (list(exchange) for exchange in exchanges)
    if not first or first[0] is not Side.SYSTEM:
        return None, [first, *others]
    end = next((i for i, p in enumerate(first) if p in (Side.USER, Side.ASSISTANT)), len(first))
    said = [part for part in first[:end] if part is not Side.SYSTEM]
    prompt = "\n".join(part for part in said if isinstance(part, str))
    refuse_broken(prompt, "messages")
    if any(isinstance(part, PictureAddress) for part in said):
        raise RequestError("a system prompt holds words alone, no picture", param="messages")
    if len(prompt) > limits.max_characters:
        raise RequestError(
            f"{len(prompt)} characters in the system prompt, at most {limits.max_characters}",
            param="messages",
            code="context_length_exceeded",
        )
    return prompt or None, [first[end:], *others]
