"""The tiny language model: an OPT that reads about a scene, answers questions and sums up.

Its texts are those of `miniature.texts`. It learns from texts in words first, then goes on with
illustrated ones.
"""

import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

from miniature.language import (
    SUMMARY_ORDER,
    caption,
    dialogue,
    dialogue_prompt,
    picture_words,
    question_prompt,
    stated,
    story,
    story_prompt,
)
from miniature.optimization import Optimization, Recipe, Report
from miniature.texts import Read, document, first_document, illustrated_document, read
from miniature.vocabulary import MAX_POSITIONS, language_model_tokenizer
from miniature.world import ATTRIBUTES, VALUES, Scene, Split, draw_scene

# Of a picture's words in training: the logarithms of the least and the greatest factor on their
# rows, and the greatest noise, in standard deviations of the rows.
LOUDNESS = (-0.3, 2.0)
BLUR = 1.0


class LanguageModelRecipe(Recipe):
    """Sizes and training of the tiny language model."""

    width: int = 96  # e
    num_layers: int = 4
    num_heads: int = 4
    num_steps: int = 2600  # of `batch_tokens` tokens each
    num_illustrated_steps: int = 600  # of as many, on texts with pictures, after the others
    batch_tokens: int = 4096
    matrix_rate: float = 0.01
    other_rate: float = 3e-3


def _windows(
    tokenizer: GPT2Tokenizer, write_text: Callable[[random.Random], str], length: int, seed: str
) -> Iterator[Read]:
    """Endless windows of `length` tokens: texts, each with its `</s>`, the last one cut."""
    rng = random.Random(seed)
    while True:
        window = Read([], [])
        while len(window.ids) < length:
            text = read(tokenizer, write_text(rng))
            window.ids.extend(text.ids)
            window.of_picture.extend(text.of_picture)
        yield Read(window.ids[:length], window.of_picture[:length])


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
    _train_on_words(model, tokenizer, recipe, seed, report)
    # The second part begins with the weights as they are stored, so that it can be run by itself.
    write(model, tokenizer, directory)
    model, _ = load(directory)
    _train_on_pictures(model, tokenizer, recipe, seed, report)
    write(model, tokenizer, directory)
    return measure(model, tokenizer, "test", 200)


def _train_on_words(
    model: OPTForCausalLM,
    tokenizer: GPT2Tokenizer,
    recipe: LanguageModelRecipe,
    seed: int,
    report: Report,
) -> None:
    optimization = Optimization(
        model.named_parameters(), recipe.num_steps, recipe.matrix_rate, recipe.other_rate
    )
    # Easy texts and short windows first: few words to look among, and cheap.
    lessons = {0.0: (first_document, 64), 0.1: (document, 128), 0.25: (document, MAX_POSITIONS)}
    windows: Iterator[Read] = iter(())
    length = 0
    for step in optimization.steps("language model", report):
        lesson = max(share for share in lessons if step >= share * recipe.num_steps)
        if lessons[lesson][1] != length:
            write_text, length = lessons[lesson]
            windows = _windows(tokenizer, write_text, length, f"{seed} {length}")
        batch = torch.tensor(
            [next(windows).ids for _ in range(recipe.batch_tokens // length)], dtype=torch.int64
        )
        loss = model(input_ids=batch, labels=batch).loss
        optimization.step(loss)
        if (step + 1) % 250 == 0:
            report(f"language model: {measure(model, tokenizer, 'val', 60)}")


def _train_on_pictures(
    model: OPTForCausalLM,
    tokenizer: GPT2Tokenizer,
    recipe: LanguageModelRecipe,
    seed: int,
    report: Report,
) -> None:
    """Goes on with illustrated texts, in which a picture's words are blurred and often louder.

    So are the vectors of a trained W_cap, which come out five times as long as a word's. Beside
    them the position embeddings vanish, by which a model that knows only words tells what was said
    last: to such a model no event changes what a picture before it has told.
    """
    torch.manual_seed(seed)
    share = 0.6  # of the rates of the first part
    optimization = Optimization(
        model.named_parameters(),
        recipe.num_illustrated_steps,
        share * recipe.matrix_rate,
        share * recipe.other_rate,
        decay_share=0.8,
    )
    windows = _windows(tokenizer, illustrated_document, MAX_POSITIONS, f"{seed} illustrated")
    number = recipe.batch_tokens // MAX_POSITIONS
    rows = model.get_input_embeddings().weight
    model.train()
    for _ in optimization.steps("language model, pictures", report):
        texts = [next(windows) for _ in range(number)]
        ids = torch.tensor([text.ids for text in texts])
        of_picture = torch.tensor([text.of_picture for text in texts])[..., None]
        loudness = torch.exp(torch.empty(number, 1, 1).uniform_(*LOUDNESS))
        blur = BLUR * torch.rand(number, 1, 1) * rows.detach().std()
        embeddings = rows[ids]
        shown = loudness * (embeddings + blur * torch.randn_like(embeddings))
        loss = model(inputs_embeds=torch.where(of_picture, shown, embeddings), labels=ids).loss
        optimization.step(loss)
    model.eval()


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
    tokens = read(tokenizer, text + " picture:").ids
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
    """The share of stated attributes that the model knows, by kind of text, on a split's scenes.

    `illustrated` is a story whose first four captions are each followed by the words of a picture.
    """
    rng = random.Random(f"what the language model knows, {split} {seed}")
    kinds = ("caption", "story", "dialogue", "illustrated")
    texts: dict[str, list[tuple[str, Scene]]] = {kind: [] for kind in kinds}
    for _ in range(num_texts):
        moments = story(rng, split)
        texts["story"].append((story_prompt([m.caption for m in moments]), moments[-1].scene))
        scene = draw_scene(rng, split)
        texts["caption"].append((caption(scene, rng), scene))
        texts["dialogue"].append((dialogue_prompt(dialogue(scene, rng)), scene))
        *shown, last = moments
        before = "".join(m.caption + picture_words(m.scene, rng) for m in shown)
        texts["illustrated"].append((before + last.caption, last.scene))
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


def measure_written(directory: Path) -> dict[str, float]:
    """The scores of what lies in a directory."""
    return measure(*load(directory), "test", 200)


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
