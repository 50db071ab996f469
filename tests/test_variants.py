"""The variants of findings/variants.yaml as params, and what makes a cell's results stale."""

import json
from pathlib import Path

import pytest
import yaml

from evaluation.variants import (
    Cell,
    Study,
    cell,
    cell_fingerprint,
    cell_params,
    lay_over,
    read_study,
)
from gill.artifacts import Artifacts
from gill_errors import StageError
from pipeline.settings import Objective
from settings.params import ParamsError

ROOT = Path(__file__).parents[1]
STUDY = read_study(ROOT / "findings/variants.yaml")
PARAMS = ROOT / "presets/miniature.yaml"


def _changed(name: str) -> dict:
    """Which keys of `model` and `objective` a variant changes, seeds apart."""
    base, other = (
        cell_params(PARAMS, STUDY, one, 0).model_dump(mode="json") for one in ("gill", name)
    )
    return {
        f"{section}.{key}": value
        for section in ("model", "objective")
        for key, value in other[section].items()
        if value != base[section][key]
    }


def test_every_variant_changes_what_it_says_and_nothing_else():
    kinds = {name: _changed(name)["model.mapper"]["kind"] for name in ("linear", "mlp", "encoder")}
    assert kinds == {"linear": "linear", "mlp": "mlp", "encoder": "encoder"}
    assert [_changed(f"r{r}") for r in (1, 2, 4)] == [{"model.r": r} for r in (1, 2, 4)]
    assert _changed("generation_only") == {"objective.retrieval_weight": 0.0}
    assert cell_params(PARAMS, STUDY, "released", 0).objective == Objective.released()


@pytest.mark.parametrize("name", list(STUDY.variants))
def test_a_seed_is_laid_over_everything_that_draws(name):
    params = cell_params(PARAMS, STUDY, name, 3)
    sections = (params.model, params.training, params.evaluation, params.decision)
    assert [section.seed for section in sections] == [3, 3, 3, 3]
    assert "gill" in params.evaluation.methods


def test_a_mapping_is_laid_over_key_by_key_and_a_list_whole():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert lay_over(base, {"a": {"c": [3]}, "e": 5}) == {"a": {"b": 1, "c": [3]}, "d": 4, "e": 5}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 4}


def test_unknown_names_are_refused_by_name(tmp_path):
    with pytest.raises(StageError, match=r"no variant nought.*linear"):
        cell_params(PARAMS, STUDY, "nought", 0)
    wrong = Study.model_validate(
        {"seeds": [0], "variants": {"x": {"title": "x", "params": {"model": {"rr": 2}}}}}
    )
    with pytest.raises(ParamsError, match=r"variant x: model\.rr: unknown key"):
        cell_params(PARAMS, wrong, "x", 0)
    with pytest.raises(StageError, match=r"absent\.yaml is missing"):
        read_study(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("seeds: [0]\nvariantz: {}\n")
    with pytest.raises(StageError, match="variantz"):
        read_study(broken)


@pytest.fixture
def caches(tmp_path):
    """The few files by which shared caches are recognised."""
    artifacts = Artifacts(tmp_path / "artifacts")
    for path, content in (
        (artifacts.backbones, {"language_model": {"fingerprint": "a"}}),
        (artifacts.captions, {}),
        (artifacts.features.with_suffix(".manifest.json"), {"content": "b"}),
        (artifacts.targets.with_suffix(".manifest.json"), {"content": "c"}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return artifacts


def test_results_are_stale_when_params_or_caches_change(caches, tmp_path):
    def fingerprint(seed=0, study=STUDY, **changes):
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(lay_over(yaml.safe_load(PARAMS.read_text()), changes)))
        return cell_fingerprint(file, study, cell("r4", seed, caches))

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(seed=1) != first
    assert fingerprint(training={"steps": 1}) != first
    assert fingerprint(features={"shard_rows": 1}) == first  # the content of the cache matters
    assert fingerprint(run={"device": "cuda", "micro_batch_size": 2}) == first
    gill = STUDY.variant("gill")
    other = gill.model_copy(update={"params": lay_over(gill.params, {"training": {"steps": 1}})})
    variants = {**STUDY.variants, "gill": other}
    # Its own params are the same, but the W_cap that it takes is another.
    assert fingerprint(study=STUDY.model_copy(update={"variants": variants})) != first
    caches.targets.with_suffix(".manifest.json").write_text('{"content": "other"}')
    assert fingerprint() != first
    caches.captions.unlink()
    with pytest.raises(StageError, match="dvc repro"):
        fingerprint()


def test_a_cell_has_its_own_heads_and_shares_the_caches(tmp_path):
    one = Cell("r4", 2, tmp_path / "artifacts/findings/r4/2")
    assert one.artifacts.model == tmp_path / "artifacts/findings/r4/2/model"
    assert one.artifacts.evaluation == tmp_path / "artifacts/findings/r4/2/evaluation"
    for name in ("features", "targets", "captions", "backbones", "miniature", "candidates"):
        shared = getattr(Artifacts(tmp_path / "artifacts"), name)
        assert getattr(one.artifacts, name) == shared


def test_a_variant_goes_on_from_anothers_heads(caches, tmp_path):
    study = read_study(ROOT / "findings/denoising.yaml")
    name = "regression_then_denoising"
    params = cell_params(PARAMS, study, name, 2)
    assert params.training.start_from == "artifacts/findings/half/2/model"
    assert (params.objective.generation_weight, params.objective.diffusion_weight) == (0.0, 1.0)

    def fingerprint(study=study):
        return cell_fingerprint(PARAMS, study, cell(name, 2, caches))

    half = study.variant("half").model_copy(update={"params": {"training": {"steps": 9}}})
    other = study.model_copy(update={"variants": {**study.variants, "half": half}})
    assert fingerprint(other) != fingerprint() == fingerprint()
