"""params.yaml as frozen models: an unknown or impossible key is an error that names it.

Every section belongs to a stage, but for `model`, `run` and `generation`, which several share.
Sections that a room owns are defined there and only put together here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cache import Codec, FillingParams, ReadingParams, ScaleOutParams
from corpora.captions import CaptionParams
from pipeline.settings import (
    DecisionSettings,
    GenerationSettings,
    IndexSettings,
    MapperSizes,
    Objective,
    TrainingSettings,
)
from stages.evaluation_params import EvaluationParams


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunParams(Section):
    device: str = Field("auto", description="`auto` takes a GPU where there is one, else the CPU")
    threads: int = Field(1, ge=1, description="CPU threads of torch")
    checkpoint: Literal["last", "best"] = Field(
        "last", description="which heads are indexed, evaluated and talked to"
    )


class MiniatureParams(Section):
    pictures: int = Field(6000, ge=1, description="training pictures to draw")
    captions_per_picture: int = Field(2, ge=1)
    held_out_pictures: int = Field(600, ge=1, description="pictures for each of val and test")
    stories: int = Field(100, ge=1)
    dialogues: int = Field(100, ge=1)
    prompts: int = Field(300, ge=1)
    seed: int = 0


class CaptionsParams(CaptionParams):
    """`table: miniature` draws the miniature world; anything else is the user's own table."""

    table: str = "miniature"
    miniature: MiniatureParams = MiniatureParams()

    def for_table(self, table: str) -> CaptionParams:
        """The same checks for the table that was drawn, or named."""
        fields = {name: getattr(self, name) for name in CaptionParams.model_fields}
        return CaptionParams(**{**fields, "table": table})


DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
_COMPUTES_IN: DtypeChoice = Field(
    "auto",
    description="what the frozen model computes in; auto: bfloat16 on a GPU that has it, else "
    "float32. `prepare-backbones` writes down what it came to",
)


class BackbonesParams(Section):
    language_model: str = Field("miniature", description="`miniature`, a directory, or a hub id")
    visual_encoder: str = Field(
        "miniature", description="as above, or an open_clip ARCHITECTURE:TAG"
    )
    image_generator: str = Field("miniature", description="as language_model: a diffusers pipeline")
    language_model_revision: str | None = None
    visual_encoder_revision: str | None = None
    image_generator_revision: str | None = None
    allow_download: bool = Field(False, description="whether hub ids may be fetched")
    language_model_dtype: DtypeChoice = _COMPUTES_IN
    image_generator_dtype: DtypeChoice = _COMPUTES_IN
    visual_encoder_dtype: DtypeChoice = _COMPUTES_IN
    language_model_quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="frozen linear weights in 8 bits, or in 4 (extra `quantized`). Heads belong to "
        "the quantisation they were trained with: another one is another language model",
    )


class PrecomputeParams(FillingParams):
    """How a store is filled and laid out."""

    shard_rows: int = Field(1024, ge=1, description="rows per shard file, written by one writer")
    codec: Codec = Codec()

    @property
    def filling(self) -> FillingParams:
        """What the cache itself takes of these."""
        return FillingParams(**{name: getattr(self, name) for name in FillingParams.model_fields})


class TargetsParams(PrecomputeParams):
    source: Literal["cache", "online"] = Field(
        "cache",
        description="`online` stores no targets and encodes each batch of captions while training",
    )


class ImageTokenInit(Section):
    kind: Literal["mean", "words"] = Field(
        "mean", description="rows around the mean of the vocabulary, or the rows of given words"
    )
    text: str = Field("", description="for `words`: text of at least r tokens")


class ModelParams(Section):
    k: int = Field(4, ge=1, description="visual tokens per picture")
    r: int = Field(8, ge=1, description="[IMG] tokens per picture")
    m: int = Field(512, ge=1, description="width of the mapping network")
    p: int = Field(256, ge=1, description="width of the retrieval space")
    mapper: MapperSizes = MapperSizes()
    image_token_init: ImageTokenInit = ImageTokenInit()
    seed: int = Field(0, description="of the trained parts' first values")


class BatchesParams(Section):
    max_caption_tokens: int = Field(23, ge=1, description="longer captions are cut, [IMG] kept")
    validation_rows: int = Field(500, ge=0, description="held-out rows measured during training")
    reading: ReadingParams = ReadingParams()


class IndexParams(ScaleOutParams, IndexSettings):
    candidates: str | None = Field(
        None,
        description="caption table of the pictures to retrieve from; null: the training pictures",
    )

    @property
    def settings(self) -> IndexSettings:
        """What the index itself takes of these."""
        return IndexSettings(**{name: getattr(self, name) for name in IndexSettings.model_fields})

    @property
    def scale_out(self) -> ScaleOutParams:
        """Where W_i2t is applied to the candidates."""
        return ScaleOutParams(scheduler=self.scheduler, num_workers=self.num_workers)


class DecisionParams(DecisionSettings):
    votes: str | None = Field(
        None,
        description="annotated prompts (Prompt, Category, Challenge, Note, Decisions); null: none, "
        "or on the miniature world the oracle's",
    )

    @property
    def settings(self) -> DecisionSettings:
        """What the classifier itself takes of these."""
        return DecisionSettings(
            **{name: getattr(self, name) for name in DecisionSettings.model_fields}
        )


class Params(Section):
    """All of params.yaml."""

    run: RunParams = RunParams()
    captions: CaptionsParams = CaptionsParams()
    backbones: BackbonesParams = BackbonesParams()
    features: PrecomputeParams = PrecomputeParams()
    targets: TargetsParams = TargetsParams()
    model: ModelParams = ModelParams()
    batches: BatchesParams = BatchesParams()
    objective: Objective = Objective()
    training: TrainingSettings = TrainingSettings()
    index: IndexParams = IndexParams()
    decision: DecisionParams = DecisionParams()
    generation: GenerationSettings = GenerationSettings()
    evaluation: EvaluationParams = EvaluationParams()


class ParamsError(Exception):
    """params.yaml cannot be used; one line per key says why."""


def read_params(path: Path) -> Params:
    """Parse and check a params file.

    Raises ParamsError with one line per wrong key: its name, what it holds, what is allowed.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} is missing: run in the repository root, or copy a file of presets/ to it"
        ) from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from error
    return parse_params(raw, path)


def parse_params(raw: object, path: Path) -> Params:
    """Check what was read from `path`. Raises ParamsError as `read_params` does."""
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold sections, found {type(raw).__name__}")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(_explain(path, e) for e in error.errors())) from None
    unnamed = params.evaluation.unnamed_files(params.captions.table == "miniature")
    if unnamed:
        raise ParamsError("\n".join(f"{path}: {line}" for line in unnamed))
    return params


def _explain(path: Path, error: object) -> str:
    """One error of pydantic as a line for the person who edits the file."""
    assert isinstance(error, dict)
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "(the whole file)"
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_fields_at(location[:-1])))
        return f"{path}: {key}: unknown key; allowed here: {allowed}"
    found = "" if error["type"] == "missing" else f" (found {error['input']!r})"
    return f"{path}: {key}: {error['msg']}{found}"


def _fields_at(location: list[str]) -> list[str]:
    model: type[BaseModel] = Params
    for name in location:
        inner = model.model_fields[name].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
