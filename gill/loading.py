"""A trained GILL to talk to: `Gill.load("artifacts")` puts together what the stages wrote.

>>> gill = Gill.load("artifacts")
>>> gill.reply(["what is this ?", Image.open("photo.png")])
[Text("..."), GeneratedImage(...)]
>>> gill.reply(["a red ring."], want="generate", candidates=4, steps=20, seed=7)
[GeneratedImage(...)]
>>> gill.save_pretrained("my-gill")  # then Gill.from_pretrained("my-gill", backbones=...)
>>> conversation = gill.conversation()
>>> for event in conversation.stream(["a red ring."], gill.settings(temperature=0.7)):
...     print(event)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from PIL import Image
from pydantic import ValidationError

from cache import open_store
from corpora.pictures import open_picture
from gill.artifacts import Artifacts
from gill.frozen import locate_backbones, read_backbones
from gill.world import have_world
from gill_errors import GillError
from pipeline.bridge.checkpoint import (
    Checkpoint,
    CheckpointRecord,
    fingerprint_heads,
    load_heads,
    read_record,
)
from pipeline.bridge.multimodal_language_model import MultimodalLanguageModel
from pipeline.devices import pick_device
from pipeline.frozen.backbones import Backbones, Role
from pipeline.frozen.conditioning import Conditioning
from pipeline.frozen.image_generator import ImageGenerator, load_image_generator
from pipeline.frozen.language_model import load_language_model
from pipeline.frozen.text_conditioner import TextConditioner, load_text_conditioner
from pipeline.frozen.visual_encoder import VisualEncoder, load_visual_encoder
from pipeline.settings import GenerationRun, GenerationSettings, TalkingSettings
from pipeline.talking.answers import ConversationError, Part, Reply, ReplySettings
from pipeline.talking.captioning import (
    CAPTION_PROMPT,
    CAPTION_QUESTION,
    CAPTION_TOKENS,
    caption_pictures,
)
from pipeline.talking.conversation import Conversation
from pipeline.talking.decision import DecisionModel
from pipeline.talking.index_files import load_index
from pipeline.talking.likelihood import Likelihood, log_likelihoods
from pipeline.talking.prefixes import Prefixes
from pipeline.talking.reading import parts_of, read_contexts
from pipeline.talking.retrieval import Retrieved
from pipeline.talking.speaker import Speaker
from settings.params import MINIATURE, read_unchecked
from workfolder import WorkFolder

if TYPE_CHECKING:
    from gill.model_card import CardNumber


@dataclass(eq=False)
class Gill(Speaker):
    """A loaded model; `reply` answers one turn, `conversation` begins a dialogue that remembers.

    Wherever `settings` are taken, single knobs may be given by name instead: see `settings`.
    """

    backbones: Backbones | None = None
    record: CheckpointRecord | None = None
    caption_prompt: str = CAPTION_PROMPT
    """What stands between a picture and its caption."""
    talking: TalkingSettings = field(default_factory=TalkingSettings)
    """How answers go on behind their own pictures, where a reply does not say."""

    @classmethod
    def load(
        cls,
        directory: str | Path | Artifacts = "artifacts",
        *,
        device: str = "auto",
        checkpoint: Checkpoint | None = None,
        with_decision: bool = True,
    ) -> Gill:
        """Load everything below `directory`; the index and the decision model where they exist.

        `directory` may be `Artifacts` whose caches lie elsewhere, or a folder of `save_pretrained`
        (`gill pull`), loaded without the network. `checkpoint`: by default the one
        that is there. `with_decision=False` leaves the decision model out.

        Pictures are sampled as `generation` of the params file beside `directory` says, where there
        is one, and captions begin as that run's evaluation has them begin. What the manifest and
        the index name by a relative path is looked for in the working directory, then beside
        `directory`.

        Raises BackboneError, CheckpointError, RetrievalError, DecisionError or GillError, saying
        what is missing or does not fit together.
        """
        artifacts = directory if isinstance(directory, Artifacts) else Artifacts(Path(directory))
        if (artifacts.root / "config.json").is_file():
            return cls.from_pretrained(artifacts.root, device=device, local_files_only=True)
        beside, heads_file = artifacts.common.parent, heads_of(artifacts, checkpoint)
        place = pick_device(device)
        backbones = read_backbones(artifacts)
        model = load_model(artifacts, place, checkpoint)
        _have_pictures(artifacts)
        index = decision = None
        heads = fingerprint_heads(heads_file)
        if artifacts.index.is_dir():
            index = load_index(artifacts.index, heads=heads).on(place)
        if with_decision and (artifacts.decision / "decision.json").is_file():
            decision = DecisionModel.load(artifacts.decision, heads=heads)
        conditioner = _text_side(backbones, place)
        return cls(
            model=model,
            encoder=load_encoder(backbones, place),
            generator=load_generator(backbones, place),
            empty_prompt=read_empty_prompt(artifacts, conditioner),
            index=index,
            decision=decision,
            open_picture=lambda reference: open_picture(_beside(reference, beside)),
            conditioner=conditioner,
            generation=read_generation(beside / "params.yaml"),
            backbones=backbones,
            record=read_record(heads_file),
            caption_prompt=read_caption_prompt(beside / "params.yaml"),
            talking=read_talking(beside / "params.yaml"),
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        backbones: Backbones | Mapping[Role, str] | str | Path | None = None,
        revision: str | None = None,
        device: str = "auto",
        local_files_only: bool = False,
        safety_checker: bool = True,
    ) -> Gill:
        """Load what `save_pretrained` or `push_to_hub` wrote: a folder, or a repository of the hub.

        `backbones`: the frozen models, as a manifest, the path of one, or {role: directory or hub
        id}; needed where they were local directories. What is not on this machine is downloaded,
        unless `local_files_only`. There is no candidate index: pictures are generated.
        `safety_checker=False` leaves out that of the generator, where it has one.

        Raises HubError, BackboneError or CheckpointError, saying what is missing or does not fit.
        """
        from gill.hub import find_folder, load_trained, resolve_backbones

        folder = find_folder(name_or_path, revision, local_files_only)
        config, heads, record = load_trained(folder)
        if isinstance(backbones, str | Path):
            manifest = Path(backbones)
            backbones = locate_backbones(manifest, manifest.resolve().parents[2])
        found = resolve_backbones(config, backbones, local_files_only)
        if not safety_checker:
            unchecked = found.image_generator.model_copy(update={"safety_checker": False})
            found = found.model_copy(update={"image_generator": unchecked})
        place = pick_device(device)
        model = found.language_model
        language_model = load_language_model(
            model.path,
            dtype=model.torch_dtype,
            device=place,
            quantization=model.quantization,
            chat=model.chat,
        )
        decision = None
        if (folder / "decision.json").is_file():
            decision = DecisionModel.load(folder)
        conditioner = _text_side(found, place)
        return cls(
            model=MultimodalLanguageModel(language_model, heads.to(place).eval()),
            encoder=load_encoder(found, place),
            generator=load_generator(found, place),
            empty_prompt=conditioner().unconditional(),
            index=None,
            decision=decision,
            open_picture=open_picture,
            conditioner=conditioner,
            generation=config.generation,
            backbones=found,
            record=record,
            caption_prompt=config.caption_prompt,
            talking=config.talking,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        numbers: Sequence[CardNumber] = (),
        licence: str | None = None,
    ) -> Path:
        """Write the trained part with its configuration and model card; see `gill.hub`.

        `numbers` and `licence` (of the trained part) are stated on the card.

        Raises GillError for a model that was not loaded from a checkpoint.
        """
        from gill.hub import save_trained

        if self.backbones is None or self.record is None:
            raise GillError("nothing to save: this model was not loaded from a checkpoint")
        save_trained(
            Path(folder),
            self.heads,
            self.record,
            self.backbones,
            self.decision,
            self.generation,
            self.caption_prompt,
            self.talking,
            numbers,
            licence,
        )
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        message: str = "Trained part of a GILL",
        numbers: Sequence[CardNumber] = (),
        licence: str | None = None,
    ) -> str:
        """Send what `save_pretrained` writes to the hub; gives the address of the commit.

        Raises HubError when the hub refuses, for example because nobody is logged in.
        """
        from gill.hub import upload

        with tempfile.TemporaryDirectory() as folder:
            saved = self.save_pretrained(folder, numbers=numbers, licence=licence)
            return upload(saved, repo_id, private=private, message=message)

    def conversation(
        self, prefixes: Prefixes | None = None, *, system_prompt: str | None = None
    ) -> Conversation:
        """A new conversation; with `prefixes` it need not read what others have read.

        `system_prompt`, of a chat model: instead of the one of the run.
        """
        return Conversation(self, prefixes, system_prompt=system_prompt)

    @property
    def reply_settings(self) -> ReplySettings:
        """How a turn is answered where nobody says otherwise."""
        base = super().reply_settings
        decoding = base.decoding.model_copy(update={"read_back": self.talking.read_back})
        return base.model_copy(update={"decoding": decoding})

    def settings(self, base: ReplySettings | None = None, **knobs: Any) -> ReplySettings:
        """Reply settings with some knobs changed; None leaves a knob as it is.

        Knobs are the fields of ReplySettings (want, candidates, negative_prompt, seed),
        DecodingSettings (max_tokens, max_images, min_tokens_before_image, image_bias, temperature,
        top_k, top_p, repetition_penalty, stop_at_newline, stop_after_images, read_back, ...) and
        GenerationSettings (steps, guidance, scheduler, batch_size).

        Raises GillError naming a knob that does not exist or a value that is not allowed.
        """
        base = self.reply_settings if base is None else base
        if not isinstance(base, ReplySettings):
            raise GillError(
                f"settings are {base!r:.60}, no ReplySettings: give single knobs by their names"
            )
        changed = {name: value for name, value in knobs.items() if value is not None}
        parts = {
            "decoding": base.decoding.model_dump(),
            "generation": (base.generation or self.generation).model_dump(),
        }
        whole = base.model_dump() | parts
        for name, value in changed.items():
            place = next((part for part in parts.values() if name in part), whole)
            if name not in place or name in parts:
                known = [n for section in parts.values() for n in section]
                known += [n for n in whole if n not in parts]
                raise GillError(f"there is no knob {name}; there are: {', '.join(sorted(known))}")
            place[name] = value
        try:
            return ReplySettings.model_validate(whole)
        except ValidationError as error:
            lines = []
            for problem in error.errors():
                where = ".".join(str(step) for step in problem["loc"] if step not in parts)
                lines.append(f"{where}: {problem['msg']} (found {problem['input']!r})")
            raise GillError("; ".join(lines)) from None

    def reply(
        self, turn: Sequence[Part] | Part, settings: ReplySettings | None = None, **knobs: Any
    ) -> Reply:
        """Answer a turn that stands alone. Raises ConversationError and GillError."""
        return self.conversation().reply(parts_of(turn), self.settings(settings, **knobs))

    def caption(
        self, pictures: Sequence[Image.Image] | Image.Image, max_tokens: int = CAPTION_TOKENS
    ) -> list[str]:
        """What is on each picture, as Table 7 measures it: greedy words after the picture and
        `caption_prompt`, up to the first full stop. Raises ConversationError for what is none."""
        shown = [part for part in parts_of(pictures) if isinstance(part, Image.Image)]
        if len(shown) < len(parts_of(pictures)):
            raise ConversationError("only pictures (PIL.Image.Image) have captions")
        if not shown:
            return []
        if not _is_count(max_tokens) or max_tokens < 1:
            raise ConversationError(f"max_tokens is {max_tokens!r:.60}: give at least 1")
        pooled = self.encoder.encode_pictures(shown).float()
        return caption_pictures(self.model, pooled, self.caption_prompt, max_tokens)

    def retrieve(
        self, context: Sequence[Part] | Part, n: int = 1, exclude: Sequence[int] = ()
    ) -> list[Retrieved]:
        """The candidates closest to what the [IMG] tokens after `context` ask for, best first: at
        most as many as there are.

        Raises ConversationError without an index, and where `n` or `exclude` do not suit it.
        """
        if self.index is None:
            raise ConversationError("nothing to retrieve from: there is no candidate index")
        if not _is_count(n) or n < 1:
            raise ConversationError(f"n is {n!r:.60}: ask for at least 1 picture")
        if not isinstance(exclude, list | tuple | set | frozenset) or not all(
            map(_is_count, exclude)
        ):
            raise ConversationError(f"exclude is {exclude!r:.60}: give the numbers of rows")
        hidden = read_contexts(self.model, self.encoder, [parts_of(context)])
        with torch.no_grad():
            query = self.model.text_query(hidden).float().cpu()
        return self.index.search(
            query, min(int(n), len(self.index)), exclude=[int(row) for row in exclude]
        )[0]

    def log_likelihoods(
        self, sequences: Sequence[Sequence[Part]], given: Sequence[Part] = ()
    ) -> list[Likelihood]:
        """How likely the words of each sequence are after `given`; see the function in pipeline."""
        if not isinstance(sequences, list | tuple):
            raise ConversationError(f"sequences are {sequences!r:.60}: give a list of turns")
        return log_likelihoods(self, [parts_of(one) for one in sequences], parts_of(given))


def _is_count(number: object) -> bool:
    """A whole number, of Python's or NumPy's, that a row can have."""
    return (
        isinstance(number, Integral) and not isinstance(number, bool) and 0 <= int(number) < 2**63
    )


def read_generation(params: Path) -> GenerationSettings:
    """How a run samples, from the sections `generation` and `run` of its params file.

    Raises GillError when the section is not one.
    """
    try:
        run = _read_section(params, "run")
        how = {name: run[name] for name in GenerationRun.model_fields if name in run}
        sizes = run.get("batch_sizes") or {}
        batch = {"batch_size": sizes["pictures"]} if "pictures" in sizes else {}
        numbers = _read_section(params, "generation")
        return GenerationSettings.model_validate({**numbers, **how, **batch})
    except ValidationError as error:
        raise GillError(f"{params}: the section `generation` cannot be used: {error}") from None


def read_talking(params: Path) -> TalkingSettings:
    """How answers go on in a run with this params file. Raises GillError as `read_generation`."""
    try:
        return TalkingSettings.model_validate(_read_section(params, "talking"))
    except ValidationError as error:
        raise GillError(f"{params}: the section `talking` cannot be used: {error}") from None


def _have_pictures(artifacts: Artifacts) -> None:
    """Draw the miniature's pictures where a run on it came here without them (`dvc pull`)."""
    params = artifacts.common.parent / "params.yaml"
    captions = _read_section(params, "captions")
    if captions.get("table") == MINIATURE and not artifacts.miniature.exists():
        named = _read_section(params, "run").get("work")
        work = WorkFolder.open(named, artifacts.common.parent)
        have_world(work, artifacts.miniature, captions.get("miniature") or {})


def read_caption_prompt(params: Path) -> str:
    """What stands between a picture and its caption in a run with this params file.

    A question for a chat model, else the prompt of the released validation; nothing on the
    miniature world, whose captions have no such beginning.
    """
    section = _read_section(params, "captions")
    if _read_section(params, "model").get("turns") == "chat":
        return CAPTION_QUESTION
    miniature = params.is_file() and section.get("table", "miniature") == "miniature"
    return "" if miniature else CAPTION_PROMPT


def _read_section(params: Path, name: str) -> dict[str, Any]:
    """A section of a params file; empty where there is none. Raises GillError for no YAML."""
    if not params.is_file():
        return {}
    try:
        return dict(read_unchecked(params).get(name) or {})
    except (TypeError, ValueError) as error:
        raise GillError(f"{params}: the section `{name}` cannot be used: {error}") from None


def heads_of(artifacts: Artifacts, checkpoint: Checkpoint | None = None) -> Path:
    """The trained heads that are asked for, by default those that are there."""
    names = get_args(Checkpoint) if checkpoint is None else [checkpoint]
    found = [artifacts.heads(name) for name in names]
    return next((path for path in found if path.is_file()), found[0])


def load_model(
    artifacts: Artifacts, device: torch.device, checkpoint: Checkpoint | None = None
) -> MultimodalLanguageModel:
    """The frozen language model with the trained heads, refusing heads of other backbones."""
    backbones = read_backbones(artifacts)
    heads, _ = load_heads(heads_of(artifacts, checkpoint), backbones=backbones.fingerprints)
    found = backbones.language_model
    language_model = load_language_model(
        found.path,
        dtype=found.torch_dtype,
        device=device,
        quantization=found.quantization,
        chat=found.chat,
    )
    return MultimodalLanguageModel(language_model, heads.to(device).eval())


def load_encoder(backbones: Backbones, device: torch.device) -> VisualEncoder:
    """The visual encoder of the manifest."""
    encoder = backbones.visual_encoder
    return load_visual_encoder(encoder.path, dtype=encoder.torch_dtype, device=device)


def load_generator(backbones: Backbones, device: torch.device) -> ImageGenerator:
    """The image side of the generator of the manifest."""
    generator = backbones.image_generator
    return load_image_generator(
        generator.path,
        dtype=generator.torch_dtype,
        device=device,
        name=generator.public_source or f"sha256:{generator.fingerprint[:12]}",
        safety_checker=generator.safety_checker is not False,
        watermark=generator.watermark,
    )


def _text_side(backbones: Backbones, device: torch.device) -> Callable[[], TextConditioner]:
    """Loads the text side of the generator when it is first asked for."""
    generator = backbones.image_generator
    return functools.cache(
        lambda: load_text_conditioner(generator.path, dtype=generator.torch_dtype, device=device)
    )


def read_empty_prompt(
    artifacts: Artifacts, conditioner: Callable[[], TextConditioner]
) -> Conditioning:
    """The empty prompt's conditioning, for classifier-free guidance.

    From the target store; where that is elsewhere (a clone that pulled the results alone) the
    generator's text encoder computes it anew.
    """
    if not artifacts.targets.exists():
        return conditioner().unconditional()
    store = open_store(artifacts.targets)
    tensors = {name: torch.from_numpy(store.constant(name))[None] for name in store.spec.constants}
    return Conditioning(tensors["empty_embedding"], tensors.get("empty_pooled"))


def _beside(reference: str, folder: Path) -> str:
    """A relative path as it is where it exists, else below `folder` where that exists."""
    file = reference.partition("#")[0]
    if Path(file).exists() or not (folder / file).exists():
        return reference
    return str(folder / reference)
