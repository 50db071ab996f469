"""The shipped backbones: real formats, small files, and as good as they are said to be.

Scores are measured on small fixed samples of held-out scenes, with bounds a few standard errors
below what was measured on large ones (`miniature/weights/*.training.json`).
"""

import json
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from miniature import recipe_image_generator, recipe_language_model, recipe_visual_encoder
from miniature.backbones import SHIPPED
from miniature.drawing import render
from miniature.language import SUMMARY_ORDER, caption, dialogue_prompt, summary, words
from miniature.recipe import PARTS, Recipes
from miniature.recipe_visual_encoder import tokenize
from miniature.vocabulary import MAX_POSITIONS, TEXT_LENGTH, clip_tokenizer, learn_merges
from miniature.world import SCENES


@pytest.fixture(scope="module")
def language_model():
    return recipe_language_model.load(SHIPPED.language_model)


@pytest.fixture(scope="module")
def image_generator():
    return recipe_image_generator.load(SHIPPED.image_generator)


# --- files --------------------------------------------------------------------------------------


def test_all_weights_are_float16_safetensors_and_small():
    files = [path for path in SHIPPED.language_model.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    for path in weights:
        with safe_open(path, "np") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {  # noqa: SIM118
                np.dtype(np.float16)
            }
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("part", PARTS)
def test_the_log_names_the_recipe_that_is_the_default(part):
    log = json.loads((SHIPPED.language_model.parent / f"{part}.training.json").read_text())
    recipes = Recipes()
    assert log["recipe"] == getattr(recipes, part).model_dump(mode="json")
    assert log["seed"] == recipes.seed
    for name, before in log["scores_in_float32"].items():
        assert log["scores"][name] == pytest.approx(before, abs=0.02), "float16 costs too much"


# --- tokenizers ---------------------------------------------------------------------------------


def test_merges_join_the_most_frequent_pair_first_until_words_are_whole():
    assert learn_merges([("a", "b", "b"), ("a", "b")]) == [("a", "b"), ("ab", "b")]
    assert learn_merges([("e", "e", "e")]) == [("e", "e"), ("ee", "e")]


def test_every_word_is_one_token_to_both_tokenizers():
    opt = AutoTokenizer.from_pretrained(SHIPPED.language_model)
    clip = open_clip.get_tokenizer(f"local-dir:{SHIPPED.visual_encoder}")
    for word in words():
        for form in (word, f" {word}"):
            assert len(opt(form, add_special_tokens=False)["input_ids"]) == 1
        assert clip(word)[0, 2] == clip("")[0, 1], "begin, the word, end"


def test_the_language_models_tokenizer_is_opts_kind():
    opt = AutoTokenizer.from_pretrained(SHIPPED.language_model)
    assert (opt.bos_token_id, opt.eos_token_id, opt.pad_token_id) == (2, 2, 1)
    assert opt("")["input_ids"] == [2]
    tokens = opt("Q: is it big? A: yes\nQ: zebra é")["input_ids"]
    assert tokens[0] == 2
    assert opt.decode(tokens[1:]) == "Q: is it big? A: yes\nQ: zebra é"
    # A natural start for eight [IMG] rows: a summary in which every value is left blank.
    blank = summary(SCENES[0], SUMMARY_ORDER, SUMMARY_ORDER)
    assert len(opt(blank, add_special_tokens=False)["input_ids"]) == 8


def test_clip_and_the_generator_read_a_text_as_the_same_tokens(image_generator):
    text = "in the Sea on the left a small red ring."
    clip = open_clip.get_tokenizer(f"local-dir:{SHIPPED.visual_encoder}")(text)
    assert clip.shape == (1, TEXT_LENGTH)
    torch.testing.assert_close(clip, tokenize(image_generator.tokenizer, [text]))
    torch.testing.assert_close(clip, tokenize(clip_tokenizer(), [text]))
    end = image_generator.tokenizer.eos_token_id
    assert clip[0, -1] == end == image_generator.tokenizer.pad_token_id == clip.max()


# --- language model -----------------------------------------------------------------------------


def test_the_language_model_loads_through_the_ordinary_loader_as_opt():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED.language_model, dtype=torch.float32)
    assert model.config.model_type == "opt"
    assert model.config.max_position_embeddings == MAX_POSITIONS >= 256
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(SHIPPED.language_model))


def test_the_language_model_knows_what_held_out_texts_state(language_model):
    scores = recipe_language_model.measure(*language_model, "test", 40, seed=2)
    assert scores["caption"] >= 0.97
    assert scores["story"] >= 0.95
    assert scores["dialogue"] >= 0.95
    assert scores["illustrated"] >= 0.95
    assert scores["answers"] >= 0.9


def test_the_language_model_sums_up_a_dialogue_of_its_own_accord(language_model):
    model, tokenizer = language_model
    rounds = [("what is this?", "a cross"), ("is it red?", "no it is blue"), ("is it big?", "yes")]
    prompt = tokenizer(dialogue_prompt(rounds) + " picture: shape", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]) == " cross color blue"


# --- visual encoder -----------------------------------------------------------------------------


def test_open_clip_loads_the_visual_encoder_and_its_preprocessing():
    source = f"local-dir:{SHIPPED.visual_encoder}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    model, tokenizer = model.eval(), open_clip.get_tokenizer(source)
    scenes = recipe_visual_encoder.SCENES[::29]
    pictures = render(scenes, 5)
    pixels = torch.stack([preprocess(Image.fromarray(each)) for each in pictures])
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pixels, expected.float())
    rng = random.Random(0)
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer([caption(s, rng) for s in scenes]), normalize=True)
    assert (texts @ images.T).argmax(1).tolist() == list(range(len(scenes)))


def test_complete_captions_find_their_pictures_among_all_scenes():
    model, tokenizer = recipe_visual_encoder.load(SHIPPED.visual_encoder)
    scores = recipe_visual_encoder.measure(model, tokenizer, seed=2)
    assert scores["recall_at_1"] >= 0.98
    assert scores["recall_at_1_held_out"] >= 0.95


# --- image generator ----------------------------------------------------------------------------


def test_the_image_generator_has_the_shapes_it_says(image_generator):
    assert image_generator.vae_scale_factor == 8
    assert image_generator.unet.config.sample_size == 8
    assert image_generator.unet.config.in_channels == 4
    assert image_generator.text_encoder.config.hidden_size == 64
    assert image_generator.tokenizer.model_max_length == TEXT_LENGTH
    assert image_generator.safety_checker is None
    pictures = image_generator("a big red ring.", num_inference_steps=2).images
    assert pictures[0].size == (64, 64)


def test_the_image_generator_draws_held_out_scenes_from_complete_captions(image_generator):
    scores = recipe_image_generator.measure(image_generator, "test", 60, seed=2)
    assert scores["attributes"] >= 0.97
    assert scores["exact"] >= 0.9
