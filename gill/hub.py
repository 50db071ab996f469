"""The trained part of a GILL in the hub's conventions: a folder to keep, to send, to load.

    config.json          sizes, the frozen models it was trained against, how it draws and captions
    model.safetensors    the trained tensors, with the record of what made them
    decision.*           the retrieve-or-generate classifier, where there is one
    README.md            the model card
    pipeline.py          names the class that is this in diffusers (`gill.diffusers_pipeline`)

The frozen models are not in it. They are named by hub id and revision where they came from the hub,
and by their fingerprint always, so that heads are never put on other models than their own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from gill.converted import have_converted
from gill.model_card import CardNumber, licence_of, write_model_card
from gill_errors import GillError, InputError
from gill_records import Record
from miniature.backbones import SHIPPED
from pipeline.bridge.checkpoint import CheckpointError, CheckpointRecord, load_heads, save_heads
from pipeline.bridge.heads import Heads, HeadSizes
from pipeline.frozen.backbones import Backbone, Backbones, ChatSettings, Dtype, Quantization, Role
from pipeline.frozen.gguf_files import names_gguf
from pipeline.frozen.pinning import resolve_backbone
from pipeline.settings import GenerationSettings, TalkingSettings
from pipeline.talking.captioning import CAPTION_PROMPT
from pipeline.talking.decision import DecisionModel
from settings.params import MINIATURE
from workfolder import WorkFolder

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PIPELINE = "pipeline.py"
PIPELINES = {
    "StableDiffusionPipeline": "GillPipeline",
    "StableDiffusionXLPipeline": "GillXLPipeline",
}
"""A generator's class -> ours in `gill.diffusers_pipeline`."""
_PIPELINE_FILE = '''"""In diffusers: from_pretrained(GENERATOR, custom_pipeline=THIS, gill=THIS)."""

from gill.diffusers_pipeline import {}
'''
_FILES = [CONFIG, WEIGHTS, CARD, PIPELINE, "decision.json", "decision.safetensors"]


class HubError(GillError):
    """A folder or repository that holds no trained part, or cannot be reached."""


class FrozenModel(Record):
    """One frozen model that the trained part belongs to."""

    source: str | None = Field(description="hub id or built-in tag; none for a local directory")
    revision: str | None = Field(description="the hub's commit")
    fingerprint: str = Field(description="of its weights and configuration")
    dtype: Dtype
    quantization: Quantization = "none"
    chat: ChatSettings | None = None
    widths: dict[str, int]
    licence: str | None = Field(None, description="an SPDX or hub identifier; none: not known")


class TrainedConfig(Record):
    """What config.json holds."""

    model_type: Literal["gill"] = "gill"
    format: Literal[1] = 1
    sizes: HeadSizes
    backbones: dict[Role, FrozenModel]
    generation: GenerationSettings
    caption_prompt: str = CAPTION_PROMPT
    talking: TalkingSettings = TalkingSettings()
    step: int
    num_parameters: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """Role -> fingerprint, as checkpoints carry them."""
        return {role: one.fingerprint for role, one in self.backbones.items()}


def save_trained(
    folder: Path,
    heads: Heads,
    record: CheckpointRecord,
    backbones: Backbones,
    decision: DecisionModel | None,
    generation: GenerationSettings,
    caption_prompt: str,
    talking: TalkingSettings,
    numbers: Sequence[CardNumber] = (),
    licence: str | None = None,
) -> None:
    """Write the folder; files of the same names are replaced, others left alone.

    `numbers` of an evaluation and the `licence` of the trained part go into the card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainedConfig(
        sizes=heads.sizes,
        backbones={role: _frozen(getattr(backbones, role)) for role in get_args(Role)},
        generation=generation,
        caption_prompt=caption_prompt,
        talking=talking,
        step=record.step,
        num_parameters=sum(p.numel() for p in heads.parameters()),
    )
    save_heads(folder / WEIGHTS, heads, record)
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if decision is not None:
        decision.save(folder)
    in_diffusers = PIPELINES.get(_class_of(Path(backbones.image_generator.path)) or "")
    if in_diffusers is not None:
        text = _PIPELINE_FILE.format(in_diffusers)
        (folder / PIPELINE).write_text(text, encoding="utf-8")
    card = write_model_card(
        config.model_dump(mode="json"),
        record.model_dump(mode="json"),
        has_decision=decision is not None,
        numbers=numbers,
        licence=licence,
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def load_trained(folder: Path) -> tuple[TrainedConfig, Heads, CheckpointRecord]:
    """Read the folder. Raises HubError or CheckpointError, saying what is missing or wrong."""
    path = folder / CONFIG
    try:
        config = TrainedConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise HubError(f"{path} is missing: {folder} holds no trained GILL") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HubError(f"{path} is not JSON: {error}") from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise HubError(f"{path} is not the configuration of a trained GILL: {wrong}") from None
    try:
        heads, record = load_heads(folder / WEIGHTS, sizes=config.sizes)
    except ValueError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error
    if record.backbones and record.backbones != config.fingerprints:
        raise HubError(f"{path} names other frozen models than {WEIGHTS} was trained against")
    return config, heads, record


def find_folder(name: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """The folder itself, or that of a hub repository, downloaded if it may be."""
    if Path(name).is_dir():
        return Path(name)
    return _download(str(name), revision, local_files_only=local_files_only)


def pull(repo_id: str, folder: Path, revision: str | None) -> tuple[TrainedConfig, Path]:
    """Download a repository's trained part into `folder`, and see that it is one.

    A folder that an earlier pull filled is brought up to date. Raises InputError where something
    else lies there, HubError where the hub gives nothing, or nothing of ours.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder with --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ".cache/huggingface").is_dir():
        raise InputError(f"{folder} is not empty: name another folder with --out")
    _download(repo_id, revision, local_dir=folder)
    return load_trained(folder)[0], folder


def _download(name: str, revision: str | None, **where: Any) -> Path:
    from huggingface_hub import snapshot_download

    with _one_line(f"{name}: not to be had from the hub"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, **where))


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Say in a line why the hub did not do something, and what to do. Raises HubError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        why = "neither a folder here nor a repository id (OWNER/NAME)"
    except errors.RevisionNotFoundError:
        why = "it has no such revision"
    except errors.RepositoryNotFoundError:
        why = "it has no such repository, or shows it only to others (`hf auth login`)"
    except errors.LocalEntryNotFoundError:
        why = "it cannot be reached, and nothing of it lies on this machine"
    except errors.HfHubHTTPError as error:
        why = {
            401: "nobody is logged in: `hf auth login`, or set HF_TOKEN",
            403: "this login may not do that there",
        }.get(error.response.status_code, _first_line(error))
    except ValueError as error:  # of the card's metadata, by the hub's own check
        why = "; ".join(line.strip() for line in str(error).splitlines()[:4])
    except Exception as error:
        # The client's HTTP library is its own affair, and has changed: by name, not by class.
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & {"TransportError", "OfflineModeIsEnabled", "OSError"}:
            raise
        why = f"it cannot be reached ({_first_line(error) or type(error).__name__})"
    else:
        return
    raise HubError(f"{what}: {why}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def resolve_backbones(
    config: TrainedConfig,
    given: Backbones | Mapping[Role, str] | None,
    local_files_only: bool,
) -> Backbones:
    """The frozen models: from a manifest, from `given` sources by role, or as the config names.

    Raises BackboneError where one cannot be found and HubError where one is another model than the
    trained part belongs to.
    """
    if given is not None and not isinstance(given, Backbones | Mapping):
        raise HubError(
            f"backbones are {given!r:.60}: give a manifest, its path, or {{role: source}}"
        )
    if isinstance(given, Backbones):
        found = given
    else:
        sources = dict(given or {})
        resolved: dict[str, Backbone] = {}
        for role in get_args(Role):
            frozen = config.backbones[role]
            source = sources.pop(role, frozen.source)
            if source is None:
                raise HubError(
                    f"the {role.replace('_', ' ')} was a local directory with the fingerprint "
                    f"{frozen.fingerprint[:12]}: name yours as backbones={{{role!r}: DIRECTORY}}"
                )
            folder = source
            if source == MINIATURE:
                folder = str(getattr(SHIPPED, role))
            elif role == "language_model" and names_gguf(source):
                folder = str(have_converted(source, WorkFolder.open(None)))
            pinned = resolve_backbone(
                role,
                folder,
                revision=frozen.revision if source == frozen.source else None,
                allow_download=not local_files_only,
                dtype=frozen.dtype,
                quantization=frozen.quantization,
                chat=frozen.chat,
            )
            resolved[role] = pinned.model_copy(update={"source": source})
        if sources:
            raise HubError(
                f"no such role: {', '.join(sources)}; roles: {', '.join(get_args(Role))}"
            )
        found = Backbones.model_validate(resolved)
    for name, fingerprint in config.fingerprints.items():
        theirs: Backbone = getattr(found, name)
        if theirs.fingerprint != fingerprint:
            raise HubError(
                f"the {name.replace('_', ' ')} {theirs.source} is another model "
                f"({theirs.fingerprint[:12]}) than the one trained against ({fingerprint[:12]})"
            )
    return found


def upload(folder: Path, repo_id: str, *, private: bool | None, message: str) -> str:
    """Send a saved folder to the hub, with the login that huggingface_hub finds; gives its address.

    Raises HubError when the hub refuses.
    """
    from huggingface_hub import HfApi

    with _one_line(f"{repo_id} could not be sent to the hub"):
        api = HfApi()
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            commit_message=message,
            allow_patterns=_FILES,
        )
    return str(commit.commit_url)


def _class_of(generator: Path) -> str | None:
    index = generator / "model_index.json"
    if not index.is_file():
        return None
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name")


def _frozen(backbone: Backbone) -> FrozenModel:
    kept: dict[str, Any] = backbone.model_dump(include=set(FrozenModel.model_fields))
    folder = Path(backbone.path.removeprefix("local-dir:"))
    licence = licence_of(backbone.source, folder)
    if licence is None and backbone.gguf is not None:
        licence = backbone.gguf.licence
    return FrozenModel(**kept | {"source": backbone.public_source, "licence": licence})
