"""params.yaml: its keys, what each is said to be, and what is refused and how."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evaluation.variants import lay_over
from settings.params import MOVED, Params, ParamsError, parse_params, read_params

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))

KEYS = """
run.attention_slicing
run.batch_sizes.features
run.batch_sizes.pictures
run.batch_sizes.targets
run.cache_folder
run.cache_limit
run.checkpoint_every
run.convolutions
run.cpu_offload
run.device
run.fuse_layers
run.log_every
run.loggers
run.micro_batch_size
run.pictures_every
run.prefetch
run.preview_every
run.readers
run.recompute_activations
run.scheduler
run.shard_language_model
run.stores
run.threads
run.vae_slicing
run.work
run.workers
captions.allow_download
captions.allow_outside
captions.check
captions.columns.caption
captions.columns.id
captions.columns.image
captions.columns.split
captions.documents.file
captions.documents.images_dir
captions.encoding
captions.images_dir
captions.max_caption_chars
captions.max_pixels
captions.miniature.captions_per_picture
captions.miniature.dialogues
captions.miniature.held_out_pictures
captions.miniature.pictures
captions.miniature.prompts
captions.miniature.seed
captions.miniature.stories
captions.quoting
captions.seed
captions.several_captions
captions.table
captions.test_fraction
captions.val_fraction
backbones.allow_download
backbones.image_generator
backbones.image_generator_dtype
backbones.image_generator_revision
backbones.language_model
backbones.language_model_dtype
backbones.language_model_quantization
backbones.language_model_revision
backbones.safety_checker
backbones.visual_encoder
backbones.visual_encoder_dtype
backbones.visual_encoder_revision
backbones.watermark
features.codec.compressor
features.codec.dtype
features.codec.level
features.codec.share_first
features.shard_rows
targets.codec.compressor
targets.codec.dtype
targets.codec.level
targets.codec.share_first
targets.shard_rows
targets.source
model.image_token_init.kind
model.image_token_init.texts
model.k
model.m
model.mapper.adds_embedding
model.mapper.decoder_layers
model.mapper.encoder_layers
model.mapper.feedforward
model.mapper.kind
model.mapper.num_heads
model.p
model.r
model.seed
model.standardizes_states
model.system_prompt
model.template_options
model.turns

batches.documents_without_pictures_between
batches.max_caption_tokens
batches.max_document_tokens
batches.reading.block_rows
batches.reading.buffer_rows
batches.reading.on_damage
batches.validation_rows
objective.captioning_softmax
objective.captioning_weight
objective.condition_dropout
objective.contrastive_gradient
objective.diffusion_weight
objective.generation_loss
objective.generation_weight
objective.image_token_targets
objective.image_token_weight
objective.learn_temperature
objective.pack_probability
objective.packing_unit
objective.rescale_image_rows
objective.retrieval_weight
objective.separate_image_draws
objective.supervise_second
objective.supervise_start
objective.token_reduction
objective.trained_dtype
training.batch_size
training.betas
training.captioning_from
training.checkpoint
training.clip_norm
training.epsilon
training.image_token_rate
training.language_model_dtype
training.learning_rate
training.mixture
training.replies.held_out
training.replies.joined
training.replies.max_tokens
training.replies.questions
training.replies.seed
training.schedule.at
training.schedule.begin
training.schedule.kind
training.schedule.to
training.seed
training.start_from
training.steps
training.validate_every
training.warmup_steps
training.weight_decay
training.weights
index.candidates
index.hnsw_build_effort
index.hnsw_links
index.hnsw_search_effort
index.ivf_lists
index.ivf_probes
index.ivf_training_vectors
index.kind
index.pq_bytes
index.rerank
index.seed
decision.folds
decision.img_tokens
decision.regularisation
decision.seed
decision.test_fraction
decision.use_similarity
decision.votes
generation.guidance
generation.scheduler
generation.steps
generation.vae_tiling

talking.read_back

evaluation.captions
evaluation.chat_turns
evaluation.check
evaluation.coco.captions
evaluation.coco.images
evaluation.coco.limit
evaluation.coco_2014.captions
evaluation.coco_2014.images
evaluation.coco_2014.limit
evaluation.examples_shown
evaluation.generation.guidance
evaluation.generation.scheduler
evaluation.generation.steps
evaluation.inception_weights
evaluation.lpips_weights
evaluation.methods
evaluation.retrieval_scenes
evaluation.seed
evaluation.tables
evaluation.told_stories
evaluation.visdial.dialogues
evaluation.visdial.images
evaluation.visdial.limit
evaluation.vist.images
evaluation.vist.limit
evaluation.vist.stories
evaluation.vqa.annotations
evaluation.vqa.images
evaluation.vqa.limit
evaluation.vqa.questions
"""


def sections_in(annotation: object) -> list[type[BaseModel]]:
    """The models in a type such as `A`, `A | B` or `dict[str, A]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections_in(part)]


def leaves(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value; a table's own settings stand for those of every table."""
    for name, field in model.model_fields.items():
        inner = sections_in(field.annotation)
        if not inner:
            yield prefix + name, field
        for section in inner:
            yield from leaves(section, f"{prefix}{name}.")


def sections(model: type[BaseModel] = Params) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections(inner)


def nested(key: str, value: object) -> dict[str, Any]:
    """`a.b` and 1 as {"a": {"b": 1}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def accepted(changes: dict[str, Any]) -> Params:
    """The miniature's params with these changes."""
    raw = yaml.safe_load((ROOT / "presets/miniature.yaml").read_text(encoding="utf-8"))
    return parse_params(lay_over(raw, changes), Path("params.yaml"))


def refusal(changes: dict[str, Any]) -> list[str]:
    """The lines with which these changes are refused."""
    with pytest.raises(ParamsError) as failure:
        accepted(changes)
    return str(failure.value).splitlines()


def test_a_new_key_is_a_decision():
    """A key here is a promise to every params file that exists: one that goes belongs in MOVED."""
    assert sorted({key for key, _ in leaves()}) == sorted(KEYS.split())


def test_every_key_and_every_section_says_what_it_is():
    assert [key for key, field in leaves() if not field.description] == []
    assert [model.__name__ for model in sections() if not model.__dict__.get("__doc__")] == []


@pytest.mark.parametrize("old", sorted(MOVED))
def test_a_moved_key_names_the_new_one(old):
    new = MOVED[old]
    assert new in KEYS.split()
    assert old not in KEYS.split()
    assert refusal(nested(old, 1)) == [f"params.yaml: {old}: is now {new}"]


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("model:\n  k: 4\n  r: 8\n  k: 2\n", "k", 4),
        ("model: {k: 4}\nrun: {}\nmodel: {r: 8}\n", "model", 3),
        ("training: {schedule: {kind: step, at: 3, at: 4}}\n", "at", 1),
    ],
)
def test_a_key_written_twice_is_refused(tmp_path, text, key, line):
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(
        ParamsError, match=rf"the key {key} is written twice.*line {line},"
    ) as error:
        read_params(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- model\n", "must hold sections, found list"),
        ("", "must hold sections, found NoneType"),
        ("model: {k: 4\n", "is not YAML"),
    ],
)
def test_what_is_no_params_file_is_refused(tmp_path, text, words):
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=re.escape(f"{file} {words}")):
        read_params(file)


_DOCUMENTS = {"documents": {"file": "documents.jsonl"}}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"training": {"weights": "a", "start_from": "b"}},
            "training.weights: goes without training.start_from: use weights as they are, or train "
            "on from them",
        ),
        (
            {
                "training": {"captioning_from": "a"},
                "objective": {"captioning_softmax": "words_and_images"},
            },
            "training.captioning_from: l_c trains E_img too where objective.captioning_softmax is "
            "words_and_images: it cannot be left out",
        ),
        (
            {
                "run": {"shard_language_model": True},
                "backbones": {"language_model_quantization": "nf4"},
            },
            "run.shard_language_model: does not go with a language model in nf4: set "
            "backbones.language_model_quantization: none",
        ),
        (
            {"backbones": {"language_model_dtype": "float16"}},
            "backbones.language_model_dtype: gradients underflow in float16: train with bfloat16 "
            "or float32",
        ),
        ({"model": {"m": 66}}, "model.m: 66 is no multiple of model.mapper.num_heads (4)"),
        (
            {"training": {"batch_size": 63}},
            "training.batch_size: 63 is odd, but examples are packed in pairs: make it even, or "
            "set objective.pack_probability: 0",
        ),
        (
            {"training": {"mixture": {"captions": 1, "documents": 1}}},
            "training.mixture: names documents, but captions.documents.file names no file",
        ),
        (
            {"training": {"mixture": {"captions": 63, "documents": 1}}, "captions": _DOCUMENTS},
            "training.mixture: 63 captions a step are odd, but examples are packed in pairs: "
            "choose other weights, or set objective.pack_probability: 0",
        ),
        (
            {
                "training": {"mixture": {"documents": 1}},
                "captions": _DOCUMENTS,
                "run": {"shard_language_model": True},
            },
            "training.mixture: documents do not go with run.shard_language_model, whose passes are "
            "common to all processes",
        ),
        (
            {"training": {"mixture": {"captions": 0}}},
            "training.mixture: weights are positive numbers, or 0 for none of a corpus",
        ),
        (
            {"training": {"checkpoint": "best"}, "batches": {"validation_rows": 0}},
            "batches.validation_rows: 0 leaves nothing to choose training.checkpoint: best by",
        ),
        (
            {"run": {"micro_batch_size": 66}},
            "run.micro_batch_size: 66 is more than training.batch_size (64)",
        ),
        (
            {"index": {"kind": "ivf-pq", "pq_bytes": 7}},
            "index.pq_bytes: twice 7 does not divide model.p (64)",
        ),
        (
            {"evaluation": {"vist": {"stories": "val.json"}}},
            "evaluation.vist.images: table_1 reads it, and it is not named",
        ),
    ],
)
def test_what_two_sections_say_differently_is_refused_before_anything_runs(changes, line):
    assert refusal(changes)[0] == f"params.yaml: {line}"


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"weights": "a"}},
        {"training": {"start_from": "b"}},
        {"run": {"shard_language_model": True}},
        {"training": {"weights": "a"}, "backbones": {"language_model_dtype": "float16"}},
        {"model": {"m": 66, "mapper": {"kind": "linear"}}},
        {"training": {"batch_size": 63}, "objective": {"pack_probability": 0}},
        {"run": {"micro_batch_size": 64}},
        {"evaluation": {"vist": {"stories": "val.json", "images": "pictures"}}},
    ],
)
def test_what_goes_together_is_accepted(changes):
    accepted(changes)


def test_all_contradictions_are_told_at_once():
    found = refusal({"training": {"batch_size": 63}, "run": {"micro_batch_size": 66}})
    assert [line.split(": ")[1] for line in found] == [
        "training.batch_size",
        "run.micro_batch_size",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"features": {"codec": {"kind": 1}}}, "compressor, dtype, level, share_first"),
        ({"training": {"schedule": {"kind": "step", "begin": 0.5}}}, "at, kind, to"),
        ({"evaluation": {"generation": {"table_8": {"step": 9}}}}, "guidance, scheduler, steps"),
    ],
)
def test_an_unknown_key_deep_inside_comes_with_those_allowed_there(changes, line):
    (found,) = refusal(changes)
    assert found.endswith(f": unknown key; allowed here: {line}")


def test_an_unknown_scheduler_or_objective_is_told_by_its_key():
    assert refusal({"run": {"scheduler": "dask"}}) == [
        "params.yaml: run.scheduler: 'dask' is no scheduler: single, threads, processes, "
        "local-cluster, an address, a scheduler file (found 'dask')"
    ]
    assert refusal({"objective": "published"}) == [
        "params.yaml: objective: is `paper`, `released`, or settings key by key (found 'published')"
    ]


def test_every_key_of_run_reaches_the_room_that_obeys_it():
    """What is composed of two sections holds each key as it was written."""
    run = {
        "log_every": 3,
        "checkpoint_every": 5,
        "micro_batch_size": 8,
        "recompute_activations": True,
        "fuse_layers": True,
        "shard_language_model": True,
        "preview_every": 2,
        "attention_slicing": True,
        "vae_slicing": True,
        "cpu_offload": "model",
        "convolutions": "channels_last",
        "readers": 7,
        "scheduler": "threads",
        "workers": 6,
        "prefetch": 9,
        "batch_sizes": {"features": 10, "targets": 11, "pictures": 12},
    }
    training = {"steps": 77, "checkpoint": "best"}
    params = accepted({"run": run, "training": training, "generation": {"steps": 13}})
    training = params.training_settings.model_dump()
    assert {key: training[key] for key in list(run)[:6]} == {key: run[key] for key in list(run)[:6]}
    assert (training["steps"], training["learning_rate"]) == (77, 2.0e-3)
    generation = params.generation_settings.model_dump()
    assert {key: generation[key] for key in list(run)[6:11]} == {
        key: run[key] for key in list(run)[6:11]
    }
    assert (generation["steps"], generation["guidance"], generation["batch_size"]) == (13, 2.5, 12)
    filling = params.run.filling(params.run.batch_sizes.targets)
    assert (filling.batch_size, filling.num_readers) == (11, 7)
    assert (params.run.scale_out.scheduler, params.run.scale_out.num_workers) == ("threads", 6)
    reading = accepted({"run": run, "batches": {"reading": {"block_rows": 4}}}).reading
    assert (reading.block_rows, reading.prefetch) == (4, 9)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_read_again_from_what_it_came_to(preset):
    """A saved experiment holds every key; reading it gives the same params."""
    params = read_params(preset)
    written = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)
    assert parse_params(yaml.safe_load(written), preset) == params
