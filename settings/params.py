"""params.yaml as frozen models: an unknown or impossible key is an error that names it.

`run` is how: where, with how much memory and how often something is written. No number depends on
it, so DVC does not watch it and resuming ignores it. Every other section is what: it decides
numbers, and belongs to the stage of its name, but `model` and `generation`, which several share.
Sections that a room owns are defined there and only put together here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from cache import Codec, FillingParams, ReadingOrder, ReadingParams
from cluster import ScaleOutParams, SchedulerName
from corpora.caption_params import CaptionParams
from gill_errors import GillError, InputError
from gill_records import Record
from pipeline.frozen.backbones import ChatSettings
from pipeline.settings import (
    DecisionSettings,
    GenerationNumbers,
    GenerationRun,
    GenerationSettings,
    IndexSettings,
    MapperSizes,
    Objective,
    TalkingSettings,
    TrainingNumbers,
    TrainingRun,
    TrainingSettings,
)
from settings.evaluation import EvaluationParams, TableName
from settings.replies import CHAT_MIXTURE, RepliesParams

MINIATURE = "miniature"
"""What `captions.table` and `backbones` say for the built-in world and models."""

MOVED = {
    "run.checkpoint": "training.checkpoint",
    "captions.workers": "run.readers",
    "model.image_token_init.text": "model.image_token_init.texts",
    "objective.mapper_adds_embedding": "model.mapper.adds_embedding",
    **{f"{section}.scheduler": "run.scheduler" for section in ("features", "targets", "index")},
    **{f"{section}.num_workers": "run.workers" for section in ("features", "targets", "index")},
    **{f"{section}.num_readers": "run.readers" for section in ("features", "targets")},
    **{
        f"{section}.batch_size": f"run.batch_sizes.{section}" for section in ("features", "targets")
    },
    "evaluation.scheduler": "run.scheduler",
    "evaluation.num_workers": "run.workers",
    "generation.batch_size": "run.batch_sizes.pictures",
    "batches.reading.prefetch": "run.prefetch",
    **{f"training.{name}": f"run.{name}" for name in TrainingRun.model_fields},
    **{f"generation.{name}": f"run.{name}" for name in GenerationRun.model_fields},
}
"""Keys of earlier versions, and where they went."""


LoggerName = Literal["dvclive", "wandb", "mlflow", "trackio", "tensorboard"]


class BatchSizes(Record):
    """Rows that a frozen model takes at once. They change rounding at most."""

    features: int = Field(64, ge=1, description="pictures per call of the visual encoder")
    targets: int = Field(64, ge=1, description="captions per call of the generator's text encoder")
    pictures: int = Field(
        8, ge=1, description="pictures per forward pass of the UNet or autoencoder"
    )


class RunParams(TrainingRun, GenerationRun):
    """How everything runs; the keys of training and sampling are described in pipeline.settings."""

    loggers: tuple[LoggerName, ...] = Field(
        ("dvclive",),
        description="who keeps the training curve: dvclive always, the others beside it (each an "
        "extra of its name); nothing is sent unless the library's own environment variable says so",
    )
    pictures_every: int = Field(
        0,
        ge=0,
        description="training steps between grids of pictures of eight held-out captions, for the "
        "loggers; 0: none. To be a multiple of log_every",
    )
    device: str = Field("auto", description="`auto` takes a GPU where there is one, else the CPU")
    threads: int = Field(1, ge=1, description="CPU threads of torch")
    readers: int | None = Field(
        None,
        ge=1,
        description="threads that read and decode pictures; null: as many as there are cores",
    )
    work: str | None = Field(
        None,
        description="the folder of all that is expensive, for any number of workspaces; null: "
        "`work` in the repository. The environment variable GILL_WORK goes before it",
    )
    stores: str | None = Field(
        None,
        pattern="^[a-z0-9+]+://.*[^/]$",
        description="where features, targets and latents lie: a URL that fsspec reads and writes "
        "(s3://bucket/gill); null: in the work folder. artifacts/ has links to them either way",
    )
    scheduler: SchedulerName = Field(
        "single", description=ScaleOutParams.model_fields["scheduler"].description
    )
    workers: int | None = Field(
        None, ge=1, description=ScaleOutParams.model_fields["num_workers"].description
    )
    batch_sizes: BatchSizes = BatchSizes()
    prefetch: int = Field(2, ge=1, description="training batches made ahead of the step")
    cache_limit: ByteSize | None = Field(
        None,
        description="training reads stores through whole copies of their shards on this machine's "
        "own disk, of at most so many bytes (or 50 GB): for a work folder on a network; best with "
        "batches.reading.block_rows a multiple of a shard's rows",
    )
    cache_folder: str | None = Field(
        None, description="where they lie; null: gill/shards in XDG_CACHE_HOME or ~/.cache"
    )

    @property
    def scale_out(self) -> ScaleOutParams:
        """Where tasks run."""
        return ScaleOutParams(scheduler=self.scheduler, num_workers=self.workers)

    def filling(self, batch_size: int) -> FillingParams:
        """How a shard is filled."""
        return FillingParams(batch_size=batch_size, num_readers=self.readers)


class MiniatureParams(Record):
    """How much of the miniature world is drawn."""

    pictures: int = Field(6000, ge=1, description="training pictures to draw")
    captions_per_picture: int = Field(2, ge=1, description="captions of each of them")
    held_out_pictures: int = Field(600, ge=1, description="pictures for each of val and test")
    stories: int = Field(100, ge=1, description="stories of five pictures, as VIST has them")
    dialogues: int = Field(100, ge=1, description="dialogues of ten rounds, as VisDial has them")
    prompts: int = Field(300, ge=1, description="annotated prompts, as PartiPrompts has them")
    seed: int = Field(0, description="of all that is drawn")


class DocumentsParams(Record):
    """Interleaved documents beside the captions; `training.mixture` says how often they come."""

    file: str | None = Field(
        None,
        description="JSONL of documents (lists of texts and images, OBELICS or mmc4 records), VIST "
        "or VisDial JSON; null: none",
    )
    images_dir: str | None = Field(
        None, description="what their pictures' names are relative to; default: the file's folder"
    )


class CaptionsParams(CaptionParams):
    """`table: miniature` draws the miniature world; anything else is the user's own table."""

    table: str = Field(
        "miniature",
        description=f"`miniature`, or {CaptionParams.model_fields['table'].description}",
    )
    miniature: MiniatureParams = MiniatureParams()
    documents: DocumentsParams = DocumentsParams()

    def for_table(self, table: str) -> CaptionParams:
        """The same checks for the table that was drawn, or named."""
        return CaptionParams(
            **self.model_dump(exclude={"miniature", "documents", "table"}), table=table
        )


DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
_COMPUTES_IN: DtypeChoice = Field(
    "auto",
    description="what the frozen model computes in; auto: bfloat16 on a GPU that has it, else "
    "float32. `prepare-backbones` writes down what it came to",
)


_REVISION: str | None = Field(None, description="hub revision; null: main, pinned when it is found")


class BackbonesParams(Record):
    """The frozen models."""

    language_model: str = Field("miniature", description="`miniature`, a directory, or a hub id")
    visual_encoder: str = Field(
        "miniature", description="as above, or an open_clip ARCHITECTURE:TAG"
    )
    image_generator: str = Field("miniature", description="as language_model: a diffusers pipeline")
    language_model_revision: str | None = _REVISION
    visual_encoder_revision: str | None = _REVISION
    image_generator_revision: str | None = _REVISION
    allow_download: bool = Field(False, description="whether hub ids may be fetched")
    language_model_dtype: DtypeChoice = _COMPUTES_IN
    image_generator_dtype: DtypeChoice = _COMPUTES_IN
    visual_encoder_dtype: DtypeChoice = _COMPUTES_IN
    safety_checker: bool = Field(
        True,
        description="whether pictures go through the image generator's own safety checker, where "
        "it has one: what that flags is black",
    )
    watermark: bool = Field(
        False,
        description="write an invisible watermark into generated pictures (extra `watermark`)",
    )
    language_model_quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="frozen linear weights in 8 bits, or in 4 (extra `quantized`). Heads belong to "
        "the quantisation they were trained with: another one is another language model",
    )


class PrecomputeParams(Record):
    """How a store is laid out."""

    shard_rows: int = Field(1024, ge=1, description="rows per shard file, written by one writer")
    codec: Codec = Codec()


class TargetsParams(PrecomputeParams):
    """The same, and whether there is a store at all."""

    source: Literal["cache", "online"] = Field(
        "cache",
        description="`online` stores no targets and encodes each batch of captions while training",
    )


class ImageTokenInit(Record):
    """First values of the [IMG] rows."""

    kind: Literal["mean", "words"] = Field(
        "mean", description="rows around the mean of the vocabulary, or means of given words"
    )
    texts: tuple[str, ...] = Field(
        (),
        description="for `words`: at least r; cut into r neighbouring groups, of each of which the "
        "row is the mean of all words",
    )


_TURNS = frozenset({"turns", "system_prompt", "template_options"})


class ModelParams(Record):
    """Sizes and first values of the trained parts."""

    k: int = Field(4, ge=1, description="visual tokens per picture")
    r: int = Field(8, ge=1, description="[IMG] tokens per picture")
    m: int = Field(512, ge=1, description="width of the mapping network")
    p: int = Field(256, ge=1, description="width of the retrieval space")
    mapper: MapperSizes = MapperSizes()
    image_token_init: ImageTokenInit = ImageTokenInit()
    standardizes_states: bool = Field(
        False,
        description="ours: mapper and W_t2i read [IMG] states less their mean, by their deviation, "
        "of each token and dimension, measured on 128 training rows before the first step. For "
        "language models whose states are nearly constant, as those of chat models are",
    )
    seed: int = Field(0, description="of the trained parts' first values")
    turns: Literal["plain", "chat"] = Field(
        "plain",
        description="`plain` continues texts; `chat` reads and answers in turns, as the chat "
        "template of the language model's tokenizer writes them. Heads belong to the turns they "
        "were trained with",
    )
    system_prompt: str | None = Field(
        None, description="for `chat`: what goes before the turns; null: the template's own, if any"
    )
    template_options: dict[str, JsonValue] = Field(
        {},
        description="for `chat`: what the template takes besides, for example "
        "{enable_thinking: false}",
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """What the sizes of the heads take of these; the frozen models give the rest."""
        return self.model_dump(exclude={"image_token_init", "seed", *_TURNS})

    @property
    def chat(self) -> ChatSettings | None:
        """How turns are written; None where texts are continued."""
        if self.turns == "plain":
            return None
        return ChatSettings(
            system_prompt=self.system_prompt, template_options=self.template_options
        )

    @model_serializer(mode="wrap")
    def _without_what_is_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the keys of turns where texts are continued, and without that of standardising
        where states are read as they are: what was trained stays known."""
        unused = set() if self.turns == "chat" else set(_TURNS)
        unused |= set() if self.standardizes_states else {"standardizes_states"}
        return {key: value for key, value in dump(self).items() if key not in unused}


class BatchesParams(Record):
    """What a training batch is made of."""

    max_caption_tokens: int = Field(23, ge=1, description="longer captions are cut, [IMG] kept")
    validation_rows: int = Field(
        500, ge=0, description="held-out rows measured during training, one per picture"
    )
    reading: ReadingOrder = ReadingOrder()
    max_document_tokens: int | None = Field(
        None,
        ge=16,
        description="positions of a document, its pictures included; what stands behind is left "
        "out. null: those of the language model",
    )
    documents_without_pictures_between: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of documents, drawn anew in each epoch, that keep their last picture "
        "alone, so that long texts are read without pictures between them too",
    )


CorpusName = Literal["captions", "documents", "asked", "shown", "told", "joined"]


def largest_remainder(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total`, as near to the weights as can be; of equals the first."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class TrainingParams(TrainingNumbers):
    """How the heads are trained, and which of them are used."""

    checkpoint: Literal["last", "best"] = Field(
        "last", description="which heads are indexed, evaluated and talked to"
    )
    weights: str | None = Field(
        None,
        description="trained heads to use instead of training: a checkpoint of ours, a folder in "
        "the released layout or of `save_pretrained`, or with backbones.allow_download a hub id",
    )
    start_from: str | None = Field(None, description="the same, with training after it")
    captioning_from: str | None = Field(
        None,
        description="the same, of which W_cap alone is taken and not trained: l_c reaches nothing "
        "else, so that runs with other [IMG] tokens or mapping networks need not train it again. "
        "With clip_norm: null the other parts are those of a whole training, bit by bit",
    )
    mixture: dict[CorpusName, float] = Field(
        {},
        description="weight of each corpus in a step, {captions: 1, documents: 1} for instance: "
        "batch_size is divided exactly, by largest remainder. {}: captions alone. With "
        "model.turns: chat, asked: a request with a caption, answered by its picture; shown: a "
        "picture and a question, answered by its caption; told: a question, answered by the frozen "
        "model's own words; joined: by such words and a picture. {}: asked 8, shown 3, told 4, "
        "joined 1",
    )
    replies: RepliesParams = RepliesParams()
    language_model_dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="what the frozen language model computes in while the heads are trained, where "
        "it is read in large batches; null: backbones.language_model_dtype, in which it is "
        "talked to in any case",
    )

    @property
    def shares(self) -> dict[str, int]:
        """Examples of each corpus in a step."""
        weights = {str(name): weight for name, weight in self.mixture.items()} or {"captions": 1.0}
        return largest_remainder(weights, self.batch_size)


class IndexParams(IndexSettings):
    """Which pictures can be retrieved, and how they are searched."""

    candidates: str | None = Field(
        None,
        description="caption table of the pictures to retrieve from; null: the training pictures",
    )


class DecisionParams(DecisionSettings):
    """What the retrieve-or-generate classifier is fitted to, and how."""

    votes: str | None = Field(
        None,
        description="annotated prompts (Prompt, Category, Challenge, Note, Decisions); null: none, "
        "or on the miniature world the oracle's",
    )


class Params(Record):
    """All of params.yaml."""

    run: RunParams = RunParams()
    captions: CaptionsParams = CaptionsParams()
    backbones: BackbonesParams = BackbonesParams()
    features: PrecomputeParams = PrecomputeParams()
    targets: TargetsParams = TargetsParams()
    model: ModelParams = ModelParams()
    batches: BatchesParams = BatchesParams()
    objective: Objective = Objective()
    training: TrainingParams = TrainingParams()
    index: IndexParams = IndexParams()
    decision: DecisionParams = DecisionParams()
    generation: GenerationNumbers = GenerationNumbers()
    talking: TalkingSettings = TalkingSettings()
    evaluation: EvaluationParams = EvaluationParams()

    @field_validator("objective", mode="before")
    @classmethod
    def _named_objective(cls, value: object) -> object:
        """`paper` and `released` stand for all of their settings."""
        if not isinstance(value, str):
            return value
        named = {"paper": Objective.paper, "released": Objective.released}
        if value not in named:
            raise InputError("is `paper`, `released`, or settings key by key")
        return named[value]()

    @property
    def is_miniature(self) -> bool:
        """Whether the captions are the built-in world's."""
        return self.captions.table == MINIATURE

    @property
    def training_settings(self) -> TrainingSettings:
        """What is minimised how, and how the run goes."""
        numbers, how = TrainingNumbers.part_of(self.training), TrainingRun.part_of(self.run)
        return TrainingSettings(**dict(numbers), **dict(how))

    @property
    def generation_settings(self) -> GenerationSettings:
        """How pictures are sampled, and with how much memory."""
        how, batch = GenerationRun.part_of(self.run), self.run.batch_sizes.pictures
        return GenerationSettings(**dict(self.generation), **dict(how), batch_size=batch)

    @property
    def reading(self) -> ReadingParams:
        """How training rows are read."""
        run = self.run
        return ReadingParams(
            **dict(self.batches.reading),
            prefetch=run.prefetch,
            cache_limit=run.cache_limit,
            cache_folder=run.cache_folder,
        )

    @property
    def stream_shares(self) -> dict[str, int]:
        """Examples of each stream in a step, over all processes."""
        if self.model.turns == "plain" or self.training.mixture:
            return self.training.shares
        return largest_remainder(CHAT_MIXTURE, self.training.batch_size)

    @property
    def evaluation_tables(self) -> tuple[TableName, ...]:
        """The tables that the stage evaluate measures."""
        return self.evaluation.chosen(self.is_miniature, self.model.turns == "chat")

    @property
    def needs_replies(self) -> bool:
        """Whether training takes the frozen model's own answers."""
        streams = self.stream_shares
        return bool(streams.get("told") or streams.get("joined"))

    def _mixture_contradictions(self) -> list[str]:
        mixture, found = self.training.mixture, []
        if any(weight < 0 for weight in mixture.values()) or (
            mixture and not sum(mixture.values())
        ):
            return ["training.mixture: weights are positive numbers, or 0 for none of a corpus"]
        chat = self.model.turns == "chat"
        for stream in mixture:
            if (stream in CHAT_MIXTURE) != chat:
                others = "plain" if chat else "chat"
                found.append(f"training.mixture: {stream} is a stream of model.turns: {others}")
        if self.stream_shares.get("joined") and not self.training.replies.joined:
            found.append(
                "training.replies.joined: 0, but training.mixture has joined: set it above 0"
            )
        if chat and not any(self.stream_shares.get(name) for name in ("asked", "shown")):
            found.append("training.mixture: has no picture in a step: give asked or shown a share")
        if chat and self.run.shard_language_model:
            found.append(
                "run.shard_language_model: does not go with model.turns: chat, whose passes are "
                "not common to all processes"
            )
        documents = mixture.get("documents", 0) > 0
        if documents and self.captions.documents.file is None:
            found.append(
                "training.mixture: names documents, but captions.documents.file names no file"
            )
        if documents and self.run.shard_language_model:
            found.append(
                "training.mixture: documents do not go with run.shard_language_model, whose passes "
                "are common to all processes"
            )
        captions = self.training.shares.get("captions", 0)
        if mixture and captions % 2 and self.objective.pack_probability > 0:
            found.append(
                f"training.mixture: {captions} captions a step are odd, but examples are packed in "
                "pairs: choose other weights, or set objective.pack_probability: 0"
            )
        return found

    def contradictions(self) -> list[str]:
        """What two sections say differently, a line each."""
        found = self.evaluation.unnamed_files(self.is_miniature)
        if "chat" in self.evaluation_tables and self.model.turns == "plain":
            found.append("evaluation.tables: chat is of a chat model: set model.turns: chat")
        model, lm = self.model, self.backbones
        if self.training.weights and self.training.start_from:
            found.append(
                "training.weights: goes without training.start_from: use weights as they are, or "
                "train on from them"
            )
        for key in ("system_prompt", "template_options"):
            if getattr(model, key) and model.turns == "plain":
                found.append(f"model.{key}: only chat has one: set model.turns: chat")
        found += self._mixture_contradictions()
        if self.training.captioning_from and self.objective.captioning_softmax != "words":
            found.append(
                "training.captioning_from: l_c trains E_img too where objective.captioning_softmax "
                "is words_and_images: it cannot be left out"
            )
        if self.run.pictures_every % self.run.log_every:
            found.append(
                f"run.pictures_every: {self.run.pictures_every} is no multiple of run.log_every "
                f"({self.run.log_every})"
            )
        if self.run.pictures_every and self.run.shard_language_model:
            found.append(
                "run.pictures_every: does not go with run.shard_language_model, whose passes are "
                "common to all processes: set it to 0"
            )
        if self.run.shard_language_model and lm.language_model_quantization != "none":
            found.append(
                "run.shard_language_model: does not go with a language model in "
                f"{lm.language_model_quantization}: set backbones.language_model_quantization: none"
            )
        if lm.language_model_dtype == "float16" and not self.training.weights:
            found.append(
                "backbones.language_model_dtype: gradients underflow in float16: train with "
                "bfloat16 or float32"
            )
        trains = not self.training.weights and bool(self.objective.diffusion_weight)
        if trains and (model.turns == "chat" or self.training.shares.get("documents")):
            found.append(
                "objective.diffusion_weight: the denoising loss is of plain captions alone: it "
                "goes without model.turns: chat and without documents in training.mixture"
            )
        if trains and lm.image_generator_dtype == "float16":
            found.append(
                "backbones.image_generator_dtype: with objective.diffusion_weight gradients pass "
                "through the UNet, and underflow in float16: train with bfloat16 or float32"
            )
        if model.m % model.mapper.num_heads and model.mapper.kind in ("gill_mapper", "encoder"):
            found.append(
                f"model.m: {model.m} is no multiple of model.mapper.num_heads "
                f"({model.mapper.num_heads})"
            )
        if self.index.kind == "ivf-pq" and model.p % (2 * self.index.pq_bytes):
            found.append(
                f"index.pq_bytes: twice {self.index.pq_bytes} does not divide model.p ({model.p})"
            )
        if self.training.batch_size % 2 and self.objective.pack_probability > 0:
            found.append(
                f"training.batch_size: {self.training.batch_size} is odd, but examples are packed "
                "in pairs: make it even, or set objective.pack_probability: 0"
            )
        chosen = self.training.checkpoint == "best" and not self.training.weights
        if chosen and not self.batches.validation_rows:
            found.append(
                "batches.validation_rows: 0 leaves nothing to choose training.checkpoint: best by"
            )
        size = self.run.micro_batch_size
        if size is not None and size > self.training.batch_size:
            found.append(
                f"run.micro_batch_size: {size} is more than training.batch_size "
                f"({self.training.batch_size})"
            )
        return found


class ParamsError(GillError):
    """params.yaml cannot be used; one line per key says why."""


def read_params(path: Path) -> Params:
    """Parse and check a params file.

    Raises ParamsError with one line per wrong key: its name, what it holds, what is allowed.
    """
    return parse_params(read_unchecked(path), path)


def read_unchecked(path: Path) -> dict[str, Any]:
    """The sections of a params file. Raises ParamsError where it is missing or has none."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats)
    except FileNotFoundError:
        raise ParamsError(
            f"{path} is missing: run where it lies, or `stages init` in an empty folder"
        ) from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must hold sections, found {type(raw).__name__}")
    return raw


def parse_params(raw: object, path: Path) -> Params:
    """Check what was read from `path`. Raises ParamsError as `read_params` does."""
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(_explain(path, e) for e in error.errors())) from None
    if found := params.contradictions():
        raise ParamsError("\n".join(f"{path}: {line}" for line in found))
    return params


class _NoRepeats(yaml.SafeLoader):
    """YAML in which a key written twice is an error: otherwise the last one wins in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[object] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is written twice", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _explain(path: Path, error: object) -> str:
    """One error of pydantic as a line for the person who edits the file."""
    assert isinstance(error, dict)
    location = [str(part) for part in error["loc"]]
    key = ".".join(location) or "(the whole file)"
    if error["type"] == "extra_forbidden" and key in MOVED:
        return f"{path}: {key}: is now {MOVED[key]}"
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_fields_at(location[:-1])))
        return f"{path}: {key}: unknown key; allowed here: {allowed}"
    found = "" if error["type"] == "missing" else f" (found {error['input']!r})"
    return f"{path}: {key}: {error['msg'].removeprefix('Value error, ')}{found}"


def _fields_at(location: list[str]) -> list[str]:
    """The keys that a section may have; the name of a schedule or a table is a place of its own."""
    models: list[type[BaseModel]] = [Params]
    for name in location:
        if name in models[0].model_fields:
            models = _models_in(models[0].model_fields[name].annotation)
        else:
            kinds = [model for model in models if "kind" in model.model_fields]
            models = [m for m in kinds if m.model_fields["kind"].default == name] or models
    return list(models[0].model_fields) if models else []


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
