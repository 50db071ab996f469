"""Trains the tiny backbones from nothing: `python -m miniature.recipe --out DIR`.

Each part leaves its directory and, beside it, PART.training.json with the recipe, the seconds and
the scores of the float16 weights as they lie there. A part whose file names the same recipe and
seed is not trained again, so an interrupted run goes on with the next part. The language model
depends on no other part and may be trained at the same time, in a process of its own (`--only`).
"""

import argparse
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import torch

from miniature import (
    recipe_autoencoder,
    recipe_image_generator,
    recipe_language_model,
    recipe_visual_encoder,
)
from miniature.backbones import Backbones
from miniature.optimization import Recipe, Report
from miniature.recipe_autoencoder import AutoencoderRecipe
from miniature.recipe_image_generator import ImageGeneratorRecipe
from miniature.recipe_language_model import LanguageModelRecipe
from miniature.recipe_visual_encoder import VisualEncoderRecipe

Part = Literal["language_model", "autoencoder", "visual_encoder", "image_generator"]
PARTS: tuple[Part, ...] = get_args(Part)
_MODULES: dict[Part, ModuleType] = {
    "language_model": recipe_language_model,
    "autoencoder": recipe_autoencoder,
    "visual_encoder": recipe_visual_encoder,
    "image_generator": recipe_image_generator,
}


class Recipes(Recipe):
    """One recipe per part, and the seed of all."""

    language_model: LanguageModelRecipe = LanguageModelRecipe()
    autoencoder: AutoencoderRecipe = AutoencoderRecipe()
    visual_encoder: VisualEncoderRecipe = VisualEncoderRecipe()
    image_generator: ImageGeneratorRecipe = ImageGeneratorRecipe()
    seed: int = 0

    def shortened(self, share: float) -> "Recipes":
        """The same with only a share of the steps of each part, at least one."""
        fields: dict[str, Recipe] = {}
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
        # What it speaks of is about to be overwritten: killed meanwhile, nothing says it is done.
        log.unlink()
    start, module = time.monotonic(), _MODULES[part]
    before_rounding = module.train(directory / part, getattr(recipes, part), recipes.seed, report)
    record = {
        **wanted,
        "seconds": round(time.monotonic() - start),
        "scores": module.measure_written(directory / part),
        "scores_in_float32": before_rounding,
        "torch": torch.__version__,
    }
    log.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    report(f"{part}: {record['seconds']} s, {record['scores']}")


def main() -> None:
    """The command line of the recipe."""
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
