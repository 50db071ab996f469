"""The tiny language model: an OPT that reads about a scene, answers questions and sums up.

Its texts are captions, stories, dialogues and requests of training scenes. Many end with a
summary in words of what they established, which teaches the model to collect it; names in a
summary are often left without their value, so that what is known of an attribute is read from the
text and not from the summary so far.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

from miniature.language import (
    CHANGEABLE,
    LITTLE,
    MOST,
    SUMMARY_ORDER,
    Mention,
    caption,
    dialogue,
    dialogue_prompt,
    opening_request,
    picture_caption,
    question_prompt,
    request,
    stated,
    story,
    story_prompt,
    summary,
)
from miniature.optimization import Optimization, Progress, Report
from miniature.vocabulary import MAX_POSITIONS, language_model_tokenizer
from miniature.world import ATTRIBUTES, VALUES, Scene, Split, draw_scene


class LanguageModelRecipe(BaseModel):
    """Sizes and training of the tiny language model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=96, description="e")
    num_layers: int = 4
    num_heads: int = 4
    num_steps: int = Field(default=2600, description="of `batch_tokens` tokens each")
    batch_tokens: int = 4096
    matrix_rate: float = 0.01
    other_rate: float = 3e-3


# --- texts --------------------------------------------------------------------------------------


def first_document(rng: random.Random) -> str:
    """A caption and its whole summary: where it is easiest to see that one repeats the other."""
    scene = draw_scene(rng, "train")
    text = caption(scene, rng, MOST)
    known = stated(text)
    return text + summary(
        scene, rng.sample(SUMMARY_ORDER, len(SUMMARY_ORDER)), {*ATTRIBUTES} - known
    )


def document(rng: random.Random) -> str:
    """One training text about training scenes."""
    kind = rng.choices(("captions", "story", "dialogue", "requests"), (25, 30, 33, 12))[0]
    if kind == "captions":
        scene = draw_scene(rng, "train")
        number = rng.choice((1, 1, 2, 3))
        text = story_prompt([picture_caption(scene, rng) for _ in range(number)])
    elif kind == "story":
        mention = rng.choice((LITTLE, Mention(0.6, 0.6, 0.6, 0.6)))
        moments = story(rng, "train", rng.choice((2, 3, 4, 5, 5)), rng.choice((2, 3, 4)), mention)
        scene, text = moments[-1].scene, story_prompt([moment.caption for moment in moments])
    elif kind == "dialogue":
        scene = draw_scene(rng, "train")
        text = dialogue_prompt(dialogue(scene, rng)[: rng.choice((1, 3, 5, 7, 10, 10))])
    else:
        scene, text = _requests(rng)
    if kind != "dialogue" and rng.random() < 0.25:
        text = _with_questions(text, scene, rng)
    if rng.random() < (0.6 if kind == "captions" else 0.85):
        text += _summary_of_stated(text, scene, rng)
    return text


def _requests(rng: random.Random) -> tuple[Scene, str]:
    moments = story(rng, "train", rng.choice((1, 2, 3, 4)), rng.choice((2, 3, 4)))
    texts = [opening_request(moments[0].scene, rng)]
    for before, after in itertools.pairwise(moments):
        changed = next(a for a in CHANGEABLE if getattr(before.scene, a) != getattr(after.scene, a))
        texts.append(request(after.scene, changed, rng))
    return moments[-1].scene, " ".join(texts)


def _with_questions(text: str, scene: Scene, rng: random.Random) -> str:
    known = stated(text)
    askable = [r for r in dialogue(scene, rng) if stated(f"Q: ? A: {r.answer}") <= known]
    for asked in askable[: rng.choice((1, 1, 2, 3))]:
        text = f"{question_prompt(text, asked.question)} {asked.answer}"
    return text


def _summary_of_stated(text: str, scene: Scene, rng: random.Random) -> str:
    known = stated(text)
    order = list(SUMMARY_ORDER)
    if rng.random() < 0.5:
        rng.shuffle(order)
    named = [name for name in order if rng.random() < (0.9 if name in known else 0.5)]
    blank = [name for name in named if name not in known or rng.random() < 0.3]
    return summary(scene, named, blank)


def _windows(
    tokenizer: GPT2Tokenizer, write_text: Callable[[random.Random], str], length: int, seed: str
) -> Iterator[list[int]]:
    """Endless windows of `length` tokens: texts, each begun by `</s>`, the last one cut."""
    rng = random.Random(seed)
    while True:
        window: list[int] = []
        while len(window) < length:
            window += tokenizer(write_text(rng))["input_ids"]
        yield window[:length]


# --- training -----------------------------------------------------------------------------------


def train(
    directory: Path, recipe: LanguageModelRecipe, seed: int, report: Report
) -> dict[str, float]:
    """Trains, writes model and tokenizer to `directory` in float16, and returns the scores."""
    torch.manual_seed(seed)
    tokenizer = language_model_tokenizer()
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            word_embed_proj_dim=recipe.width,
            ffn_dim=4 * recipe.width,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimization = Optimization(
        model.named_parameters(), recipe.num_steps, recipe.matrix_rate, recipe.other_rate
    )
    # Easy texts and short windows first: few words to look among, and cheap.
    lessons = {0.0: (first_document, 64), 0.1: (document, 128), 0.25: (document, MAX_POSITIONS)}
    windows: Iterator[list[int]] = iter(())
    length = 0
    progress = Progress("language model", recipe.num_steps, report)
    for step in progress:
        lesson = max(share for share in lessons if step >= share * recipe.num_steps)
        if lessons[lesson][1] != length:
            write_text, length = lessons[lesson]
            windows = _windows(tokenizer, write_text, length, f"{seed} {length}")
        batch = torch.tensor([next(windows) for _ in range(recipe.batch_tokens // length)])
        loss = model(input_ids=batch, labels=batch).loss
        optimization.step(loss)
        progress.seen(loss)
        if (step + 1) % 250 == 0:
            report(f"language model: {measure(model, tokenizer, 'val', 60)}")
            write(model, tokenizer, directory)
    write(model, tokenizer, directory)
    return measure(model, tokenizer, "test", 200)


def load(directory: Path) -> tuple[OPTForCausalLM, GPT2Tokenizer]:
    """What `write` wrote, in float32."""
    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), GPT2Tokenizer.from_pretrained(directory)


def write(model: OPTForCausalLM, tokenizer: GPT2Tokenizer, directory: Path) -> None:
    """Writes a directory that `AutoModelForCausalLM` and `AutoTokenizer` load, in float16."""
    deepcopy(model).half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# --- what it knows ------------------------------------------------------------------------------


@torch.no_grad()
def known_attributes(
    model: OPTForCausalLM, tokenizer: GPT2Tokenizer, text: str, scene: Scene
) -> dict[str, bool]:
    """For each attribute that a text states, whether the model's summary of it gets it right.

    It does if, of all values of the attribute, the true one is the likeliest to come next in a
    summary that is right so far.
    """
    tokens = tokenizer(text + " picture:")["input_ids"]
    place_of = {}
    for name in (name for name in SUMMARY_ORDER if name in stated(text)):
        said = f" {name} {getattr(scene, name)}"
        tokens = tokens + tokenizer(said, add_special_tokens=False)["input_ids"]
        place_of[name] = len(tokens) - 2  # of the name, after which the value comes
    logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0]
    known = {}
    for name, place in place_of.items():
        values = tokenizer([f" {v}" for v in VALUES[name]], add_special_tokens=False)["input_ids"]
        likely = int(logits[place, [value for (value,) in values]].argmax())
        known[name] = VALUES[name][likely] == getattr(scene, name)
    return known


def measure(
    model: OPTForCausalLM, tokenizer: GPT2Tokenizer, split: Split, num_texts: int, seed: int = 1
) -> dict[str, float]:
    """The share of stated attributes that the model knows, by kind of text, on a split's scenes."""
    rng = random.Random(f"what the language model knows, {split} {seed}")
    texts: dict[str, list[tuple[str, Scene]]] = {"caption": [], "story": [], "dialogue": []}
    for _ in range(num_texts):
        moments = story(rng, split)
        texts["story"].append((story_prompt([m.caption for m in moments]), moments[-1].scene))
        scene = draw_scene(rng, split)
        texts["caption"].append((caption(scene, rng), scene))
        texts["dialogue"].append((dialogue_prompt(dialogue(scene, rng)), scene))
    scores = {}
    for kind, pairs in texts.items():
        known = [known_attributes(model, tokenizer, *pair) for pair in pairs]
        flat = [right for answers in known for right in answers.values()]
        scores[kind] = round(float(np.mean(flat)), 4)
        if kind != "caption":
            for name in ATTRIBUTES:
                of_name = [answers[name] for answers in known if name in answers]
                scores[f"{kind}.{name}"] = round(float(np.mean(of_name)), 4)
    scores["answers"] = _answers(model, tokenizer, texts["caption"], rng)
    return scores


@torch.no_grad()
def _answers(
    model: OPTForCausalLM,
    tokenizer: GPT2Tokenizer,
    captions: list[tuple[str, Scene]],
    rng: random.Random,
) -> float:
    """The share of questions on a complete caption that greedy decoding answers word for word."""
    right = []
    for text, scene in captions:
        asked = dialogue(scene, rng)[0]
        prompt = tokenizer(question_prompt(text, asked.question))["input_ids"]
        answer = tokenizer(f" {asked.answer}", add_special_tokens=False)["input_ids"]
        logits: Tensor = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        # Greedy decoding gives this answer if each of its tokens is the most likely one.
        likely = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        right.append(likely == answer)
    return round(float(np.mean(right)), 4)
