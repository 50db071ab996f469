"""What the requests of all protocols have in common: their shape, and the knobs of this project.

Fields that are not known, and nulls, are ignored: clients send what other services have. Refused is
what would change the meaning of the answer, by the types of the fields.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, create_model

from app.serving.request_errors import RequestError, refuse_broken
from app.serving.settings import RequestLimits
from gill.loading import Gill
from gill_errors import GillError
from pipeline.settings import GenerationSettings
from pipeline.talking.answers import ReplySettings
from pipeline.talking.decoding import DecodingSettings

_log = logging.getLogger(__name__)

PictureForm = Literal["data", "url", "markdown"]
Modality = Literal["text", "image"]

_CLIENTS_KNOBS: Mapping[type[BaseModel], tuple[str, ...]] = {
    ReplySettings: ("want", "candidates", "negative_prompt", "seed"),
    DecodingSettings: (
        *("max_tokens", "max_images", "min_tokens_before_image", "image_bias", "temperature"),
        *("top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("stop", "stop_at_newline", "stop_after_images", "words_between_images", "read_back"),
        *("max_sentences", "finish_sentence", "image_choice"),
    ),
    GenerationSettings: ("steps", "guidance", "scheduler"),
}
"""Settings that a client may choose. The others are the operator's: memory, batches, devices."""

_CERTAIN = 1e4
"""Above any logit of a trained model."""


def _no_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("must be false")
    return value


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


# Python takes 0 for False and True for 1; JSON does not.
OnlyFalse = Annotated[Literal[False], BeforeValidator(_no_number)]
OnlyOne = Annotated[Literal[1], BeforeValidator(_no_boolean)]


class Shape(BaseModel):
    """A JSON object of a client."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


def _optional(section: type[BaseModel], name: str) -> Any:
    field = section.model_fields[name]
    # JSON has no tuples.
    lax = [Strict(False)] if get_origin(field.annotation) is tuple else []
    bounded: Any = field.annotation
    if rules := [*field.metadata, *lax]:
        bounded = Annotated[bounded, *rules]
    return bounded | None, Field(None, description=field.description)


Knobs: type[BaseModel] = create_model(
    "Knobs",
    __config__=ConfigDict(frozen=True, extra="forbid", strict=True),
    __doc__="How to answer, in this project's own words.",
    **{
        name: _optional(section, name)
        for section, names in _CLIENTS_KNOBS.items()
        for name in names
    },
)


class AnswerRequest(Shape):
    """The fields that requests for answers share."""

    model: str | None = Field(None, description="the one model that is served")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    gill: Knobs | None = None  # type: ignore[valid-type]
    pictures: PictureForm | None = Field(
        None,
        description="pictures of the answer as data URIs (data), under names that expire (url), or "
        "so and as Markdown in its text (markdown)",
    )

    def settings(
        self,
        gill: Gill,
        limits: RequestLimits,
        modalities: Collection[Modality] = (),
        **knobs: Any,
    ) -> ReplySettings:
        """How to answer: `gill`, with the protocol's own `knobs` over it where they are not None.

        Raises RequestError where that cannot be, or is longer or dearer than the limits.
        """
        chosen = {} if self.gill is None else self.gill.model_dump(exclude_none=True)
        standard = {"temperature": self.temperature, "top_p": self.top_p, **knobs}
        chosen |= {name: value for name, value in standard.items() if value is not None}
        want = chosen.get("want", "auto")
        if set(modalities) == {"text"}:
            if want in ("retrieve", "generate"):
                raise RequestError(f"want is {want}, but only text is asked for", param="gill.want")
            chosen["want"] = "text"
        elif set(modalities) == {"image"}:
            if want == "text":
                raise RequestError("want is text, but a picture is asked for", param="gill.want")
            chosen["image_bias"] = _CERTAIN
        longest = chosen.get("max_tokens") or gill.reply_settings.decoding.max_tokens
        chosen["max_tokens"] = min(longest, limits.max_tokens)
        try:
            settings = gill.settings(None, **chosen)
        except GillError as error:
            raise RequestError(str(error), param="gill", code="invalid_value") from None
        _refuse_dear(settings, limits)
        return settings


def ignored_fields(shape: Shape, below: str = "") -> Iterator[str]:
    """The names of all fields of a request that nothing here reads."""
    for name, value in (shape.model_extra or {}).items():
        if value is not None:
            yield below + name
    for name in type(shape).model_fields:
        value = getattr(shape, name)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Shape):
                yield from ignored_fields(one, f"{below}{name}.")


class IgnoredFields:
    """Names every ignored field in the log, once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, shape: Shape) -> int:
        """Log what is new; gives the number of all."""
        names = list(ignored_fields(shape))
        for name in names:
            if name not in self._told and len(self._told) < 200:
                self._told.add(name)
                _log.warning("requests have a field that is ignored: %a", name[:100])
        return len(names)


def _refuse_dear(settings: ReplySettings, limits: RequestLimits) -> None:
    decoding, generation = settings.decoding, settings.generation
    highest: dict[str, tuple[float, float]] = {
        "max_images": (decoding.max_images, limits.max_images),
        "candidates": (settings.candidates, limits.max_candidates),
        "finish_sentence": (decoding.finish_sentence, limits.max_tokens),
    }
    if generation is not None:
        highest["steps"] = (generation.steps, limits.max_steps)
        highest["guidance"] = (generation.guidance, limits.max_guidance)
    for name, (value, limit) in highest.items():
        if value > limit:
            raise RequestError(
                f"{name} is {value}, at most {limit} here", param=name, code="invalid_value"
            )
    refuse_broken(settings.negative_prompt, "negative_prompt")
    refuse_broken("".join(settings.decoding.stop), "stop")
    if len(settings.negative_prompt) > limits.max_characters:
        raise RequestError("negative_prompt is too long", param="negative_prompt")
