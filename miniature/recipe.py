"""Trains the tiny backbones from nothing: `python -m miniature.recipe --out DIR`.

Each part leaves its directory and, beside it, PART.training.json with the recipe, the seconds and
the scores of the float16 weights as they lie there. A part whose file names the same recipe and
seed is not trained again, so an interrupted run goes on with the next part. The language model
depends on no other part and may be trained at the same time, in a process of its own (`--only`).
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from pydantic import BaseModel, ConfigDict

from miniature import (
    recipe_autoencoder,
    recipe_image_generator,
    recipe_language_model,
    recipe_visual_encoder,
)
from miniature.backbones import Backbones
from miniature.optimization import Report
from miniature.recipe_autoencoder import AutoencoderRecipe
from miniature.recipe_image_generator import ImageGeneratorRecipe
from miniature.recipe_language_model import LanguageModelRecipe
from miniature.recipe_visual_encoder import VisualEncoderRecipe
from miniature.world import SCENES_OF

Part = Literal["language_model", "autoencoder", "visual_encoder", "image_generator"]
PARTS: tuple[Part, ...] = get_args(Part)


class Recipes(BaseModel):
    """One recipe per part, and the seed of all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    language_model: LanguageModelRecipe = LanguageModelRecipe()
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    visual_encoder: VisualEncoderRecipe = VisualEncoderRecipe()
    image_generator: ImageGeneratorRecipe = ImageGeneratorRecipe()
    seed: int = 0

    def shortened(self, share: float) -> "Recipes":
        """The same with only a share of the steps of each part, at least one."""
        fields: dict[str, BaseModel] = {}
        for part in PARTS:
            recipe = getattr(self, part)
            steps = {
                name: max(1, round(share * value))
                for name, value in recipe.model_dump().items()
                if name.endswith("steps")
            }
            fields[part] = recipe.model_copy(update=steps)
        return self.model_copy(update=fields)


def train_backbones(
    directory: Path,
    recipes: Recipes | None = None,
    report: Report = print,
    only: Part | None = None,
) -> Backbones:
    """Trains what is not there yet.

    Args:
        directory: where the parts' directories are or will be.
        recipes: what to train; the defaults made the shipped weights.
        report: receives progress, one line at a time.
        only: this part alone; the image generator needs autoencoder and visual encoder there.

    Returns:
        Where the backbones are.
    """
    recipes = recipes or Recipes()
    directory.mkdir(parents=True, exist_ok=True)
    for part in PARTS if only is None else (only,):
        _train_once(part, directory, recipes, report)
    return Backbones.within(directory)


def _train_once(part: Part, directory: Path, recipes: Recipes, report: Report) -> None:
    log = directory / f"{part}.training.json"
    wanted = {"recipe": getattr(recipes, part).model_dump(mode="json"), "seed": recipes.seed}
    if log.is_file():
        found = json.loads(log.read_text(encoding="utf-8"))
        if all(found[key] == value for key, value in wanted.items()):
            report(f"{part}: already trained")
            return
        log.unlink()
    start = time.monotonic()
    before_rounding = _TRAIN[part](directory, recipes, report)
    record = {
        **wanted,
        "seconds": round(time.monotonic() - start),
        "scores": _MEASURE[part](directory / part),
        "scores_in_float32": before_rounding,
        "torch": torch.__version__,
    }
    log.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    report(f"{part}: {record['seconds']} s, {record['scores']}")


def _train_language_model(directory: Path, recipes: Recipes, report: Report) -> dict[str, float]:
    return recipe_language_model.train(
        directory / "language_model", recipes.language_model, recipes.seed, report
    )


def _train_autoencoder(directory: Path, recipes: Recipes, report: Report) -> dict[str, float]:
    autoencoder, scores = recipe_autoencoder.train(recipes.autoencoder, recipes.seed, report)
    autoencoder.save_pretrained(directory / "autoencoder")
    return scores


def _train_visual_encoder(directory: Path, recipes: Recipes, report: Report) -> dict[str, float]:
    return recipe_visual_encoder.train(
        directory / "visual_encoder", recipes.visual_encoder, recipes.seed, report
    )


def _train_image_generator(directory: Path, recipes: Recipes, report: Report) -> dict[str, float]:
    return recipe_image_generator.train(
        directory / "image_generator",
        _load_autoencoder(directory / "autoencoder"),
        directory / "visual_encoder",
        recipes.image_generator,
        recipes.seed,
        report,
    )


def _load_autoencoder(directory: Path) -> AutoencoderKL:
    autoencoder = AutoencoderKL.from_pretrained(directory).eval().requires_grad_(False)
    # Otherwise the generator's configuration would name a folder of this machine.
    autoencoder.register_to_config(_name_or_path="")
    return autoencoder


_TRAIN: dict[Part, Callable[[Path, Recipes, Report], dict[str, float]]] = {
    "language_model": _train_language_model,
    "autoencoder": _train_autoencoder,
    "visual_encoder": _train_visual_encoder,
    "image_generator": _train_image_generator,
}
_MEASURE: dict[Part, Callable[[Path], dict[str, float]]] = {
    "language_model": lambda path: recipe_language_model.measure(
        *recipe_language_model.load(path), "test", 200
    ),
    "autoencoder": lambda path: recipe_autoencoder.measure(
        _load_autoencoder(path), SCENES_OF["test"] * 4
    ),
    "visual_encoder": lambda path: recipe_visual_encoder.measure(*recipe_visual_encoder.load(path)),
    "image_generator": lambda path: recipe_image_generator.measure(
        recipe_image_generator.load(path), "test", 200
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m miniature.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the backbones")
    parser.add_argument("--only", choices=PARTS, help="train this part alone")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipes = Recipes(seed=arguments.seed).shortened(arguments.share)
    train_backbones(arguments.out, recipes, lambda line: print(line, flush=True), arguments.only)


if __name__ == "__main__":
    main()
