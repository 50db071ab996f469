"""The Typer app `stages`: one command per stage of dvc.yaml, and a few to look and to move data.

Imports that cost seconds wait until a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from gill_errors import InputError
from stages.command_line import CommandLine, OneLineErrors, run_as_process


class _Stoppable(OneLineErrors):
    """A command that goes on where it was stopped."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.secho("stopped; the next run goes on from here", err=True)
            raise typer.Exit(130) from None


app = CommandLine(
    help="The stages of dvc.yaml, each a command that runs alone. Numbers come from params.yaml.",
    kind=_Stoppable,
)

ParamsFile = Annotated[
    Path, typer.Option("--params", help="The params file.", show_default=True, dir_okay=False)
]
PARAMS = Path("params.yaml")


def _run(stage: str, params: Path, **options: Any) -> None:
    """Run the stage of this name (its module here) with the numbers of a params file."""
    # Batches have many shapes, and segments that grow leave few gaps. Read when torch is imported.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from settings.params import read_params

    import_module(f"stages.{stage}").run(read_params(params), **options)


@app.command()
def check_params(params: ParamsFile = PARAMS) -> None:
    """Check the whole params file before any work.

    Reads params.yaml. Writes nothing; exits with 1 naming every wrong key.
    """
    from settings.params import read_params

    typer.echo(f"{params} is good: {read_params(params).captions.table}")


@app.command()
def init(
    preset: Annotated[str, typer.Option(help="Which whole set of params.")] = "miniature",
    table: Annotated[str | None, typer.Option(help="Your caption table.")] = None,
) -> None:
    """Begin in an empty folder: dvc.yaml, params.yaml, .gitignore and .dvc, then `dvc repro`.

    Reads the presets that are installed. Writes those files, and inputs/ with links to the code;
    exits with 1 where one of them is there.
    """
    from stages import init as command

    command.run(preset, table)


@app.command()
def doctor(
    params: ParamsFile = PARAMS,
    preset: Annotated[
        str | None, typer.Option(help="A file of presets/ by name, instead of --params.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of the caption table, where it is not here.")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="Think of this GPU, by name (RTX 4090) or gigabytes (24), not of ours."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a params file needs and costs, with no weights and no network.

    Versions, devices, downloads, dimensions, and per stage gigabytes, peak memory and hours.
    Reads the params file, and the caption table where there is one. Writes nothing; exits with 1
    where something cannot run, saying what to do.
    """
    from doctor import examination as command
    from settings.params import read_params
    from stages.init import preset_file

    file = params if preset is None else preset_file(preset)
    findings = command.examine(read_params(file), str(file), rows=rows, card=card)
    typer.echo(command.show(findings, as_json))
    if findings.problems:
        raise typer.Exit(1)


@app.command()
def prepare_captions(params: ParamsFile = PARAMS) -> None:
    """Draw the miniature world, or check the user's own caption table, and interleaved documents.

    Reads the table that `captions.table` names (TSV with header caption<TAB>image, Parquet, or
    webdataset tar shards), the documents that `captions.documents` names, and their pictures.
    Writes artifacts/captions: captions.parquet, documents.jsonl, and captions.report.json and
    captions.excluded.tsv with every row left out and why; and for the miniature world
    artifacts/miniature.
    """
    _run("prepare_captions", params)


@app.command()
def prepare_backbones(
    params: ParamsFile = PARAMS,
    retrain: Annotated[
        bool, typer.Option(help="Train the miniature backbones anew instead of unpacking them.")
    ] = False,
) -> None:
    """Find the frozen models and pin their exact revision and weights.

    Reads the sources that `backbones` names. Writes artifacts/backbones/backbones.json.
    """
    _run("prepare_backbones", params, retrain=retrain)


PartOption = Annotated[
    str | None,
    typer.Option("--part", help="Fill the third of eight parts alone (3/8): join-stores joins."),
]
PartStore = Annotated[
    str | None, typer.Option("--to", help="Where that part lies: a folder, or an fsspec URL.")
]


def _precompute(stage: str, params: Path, rebuild: bool, part: str | None, to: str | None) -> None:
    """Run a stage that fills a store, or one part of it."""
    if (part is None and to is not None) or (part is not None and rebuild):
        raise InputError("--to belongs to --part, and --rebuild to a whole store")
    _run(stage, params, rebuild=rebuild, part=part, to=to)


@app.command()
def precompute_features(
    params: ParamsFile = PARAMS,
    rebuild: Annotated[bool, typer.Option(help="Start the store over on purpose.")] = False,
    part: PartOption = None,
    to: PartStore = None,
) -> None:
    """Run the visual encoder once over every picture.

    Reads artifacts/captions and the pictures. Writes artifacts/features.zarr and its manifest
    artifacts/features.manifest.json; with --part that part alone, beside it or at --to.
    """
    _precompute("precompute_features", params, rebuild, part, to)


@app.command()
def precompute_targets(
    params: ParamsFile = PARAMS,
    rebuild: Annotated[bool, typer.Option(help="Start the store over on purpose.")] = False,
    part: PartOption = None,
    to: PartStore = None,
) -> None:
    """Run the generator's text encoder once over every caption: T_psi(y), the targets of Eq. 3.

    Reads artifacts/captions. Writes artifacts/targets.zarr and its manifest
    artifacts/targets.manifest.json; with --part that part alone, beside it or at --to.
    """
    _precompute("precompute_targets", params, rebuild, part, to)


@app.command()
def precompute_latents(
    params: ParamsFile = PARAMS,
    rebuild: Annotated[bool, typer.Option(help="Start the store over on purpose.")] = False,
    part: PartOption = None,
    to: PartStore = None,
) -> None:
    """Run the generator's autoencoder once over every picture, where `objective.diffusion_weight`
    is above 0; otherwise do nothing.

    Reads artifacts/captions and the pictures. Writes artifacts/latents.zarr and its manifest
    artifacts/latents.manifest.json; without a denoising loss a manifest that says so. With
    --part that part alone, beside it or at --to.
    """
    _precompute("precompute_latents", params, rebuild, part, to)


@app.command()
def precompute_replies(params: ParamsFile = PARAMS) -> None:
    """Have the frozen chat model answer the training questions once, in its own words.

    Only where `training.mixture` takes any. Reads artifacts/captions and the questions that
    `training.replies.questions` names. Writes artifacts/replies/replies.jsonl.
    """
    _run("precompute_replies", params)


@app.command()
def train(
    params: ParamsFile = PARAMS,
    anew: Annotated[bool, typer.Option(help="Put what is trained aside and start over.")] = False,
) -> None:
    """Train the heads against the frozen language model, or take `training.weights` as they are.

    Goes on where a killed run stopped; a finished one with the same inputs is not made again. Reads
    the stores and artifacts/captions. Writes artifacts/model and metrics/train.
    """
    _run("train", params, anew=anew)


@app.command()
def build_index(
    params: ParamsFile = PARAMS,
    rebuild: Annotated[bool, typer.Option(help="Start the candidates' store over.")] = False,
) -> None:
    """Embed the candidate pictures with W_i2t and index them.

    Reads artifacts/model, and artifacts/features.zarr or the table `index.candidates`, whose own
    features go to artifacts/candidates.zarr. Writes artifacts/index.
    """
    _run("build_index", params, rebuild=rebuild)


@app.command()
def fit_decision(params: ParamsFile = PARAMS) -> None:
    """Fit the retrieve-or-generate classifier (section 3.3, appendix C).

    Reads artifacts/model, artifacts/index and the labelled prompts. Writes artifacts/decision and
    metrics/decision.json.
    """
    _run("fit_decision", params)


@app.command()
def evaluate(params: ParamsFile = PARAMS) -> None:
    """Generate, retrieve and score on held-out examples.

    Reads artifacts/model, artifacts/index and the test split. Writes artifacts/evaluation,
    metrics/evaluation.json and the headline numbers metrics/gill.json.
    """
    _run("evaluate", params)


@app.command()
def report(params: ParamsFile = PARAMS) -> None:
    """Put everything on one self-contained page.

    Reads artifacts/evaluation, metrics and artifacts/captions. Writes artifacts/report/index.html.
    """
    _run("report", params)


@app.command()
def work(
    params: ParamsFile = PARAMS,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what no commit, experiment, workspace names.")
    ] = False,
    restore: Annotated[
        str | None, typer.Option(help="Bring back what --anew or --rebuild put aside.")
    ] = None,
) -> None:
    """List the work folder: stores, trainings, indexes, evaluations, and who uses them.

    Reads the work folder, and dvc.lock of every commit and experiment of its workspaces. Writes
    nothing, but for --prune and --restore.
    """
    from settings.params import read_params
    from stages import work as command

    if restore is not None:
        command.restore(read_params(params), restore)
    else:
        command.show(read_params(params), delete=prune)


@app.command()
def plots_page() -> None:
    """Have `dvc plots show` work without a network.

    Reads nothing. Writes .dvc/plots.html, the template that .dvc/config names.
    """
    from stages import plots_page as command

    command.write()


@app.command()
def accept(params: ParamsFile = PARAMS) -> None:
    """Say that the edits of code since the last run change no number: nothing runs again.

    Reads the code and the work folder. Writes work/accepted.json, and dvc.lock by `dvc commit`.
    """
    from settings.params import read_params
    from stages import work as command

    command.accept(read_params(params))


StudyFile = Annotated[
    Path, typer.Option("--variants", help="The variants to train.", dir_okay=False)
]
STUDY = Path("findings/variants.yaml")


@app.command()
def run_variant(
    name: Annotated[str, typer.Argument(help="One of findings/variants.yaml.")],
    seed: Annotated[int, typer.Option(help="Of first values, batches and pictures.")] = 0,
    metrics: Annotated[Path | None, typer.Option(help="Write the headline numbers here.")] = None,
    variants: StudyFile = STUDY,
    params: ParamsFile = PARAMS,
) -> None:
    """Train and measure one variant with one seed, on the caches of the main run.

    Reads artifacts/features.zarr, targets.zarr, captions, backbones. Writes
    artifacts/findings/NAME/SEED. A finished cell is not run again.
    """
    from evaluation.variants import read_study
    from stages import run_variant as stage

    stage.run(params, read_study(variants), name, seed, metrics)


@app.command()
def run_variants(
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, one thread each.")] = 2,
    seeds: Annotated[list[int] | None, typer.Option(help="Only these seeds.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these variants.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="GILL under this preset, by findings/PRESET.yaml.")
    ] = None,
    variants: StudyFile = STUDY,
    params: ParamsFile = PARAMS,
) -> None:
    """Train and measure all variants with all seeds, several at a time.

    As run-variant, cell by cell; what each prints is in artifacts/findings/NAME/SEED/log.txt. With
    --preset all lies in artifacts/presets/PRESET, and the report has a column for it.
    """
    if preset is not None:
        from stages import preset_findings

        preset_findings.run(preset, jobs=jobs, seeds=seeds)
        return
    from stages import run_variants as stage

    stage.run(params, variants, jobs=jobs, seeds=seeds, names=only)


@app.command()
def ablations(
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, one thread each.")] = 2,
    seed: Annotated[int, typer.Option(help="Of first values, batches and pictures.")] = 0,
    params: ParamsFile = PARAMS,
) -> None:
    """Train and measure every variant with one seed, each a DVC experiment: Tables 3 and 4.

    As run-variants; then `dvc exp show` has every variant, where there is a git repository.
    """
    from stages import ablations as stage

    stage.run(params, seed=seed, jobs=jobs)


@app.command()
def findings(variants: StudyFile = STUDY, params: ParamsFile = PARAMS) -> None:
    """Judge the six findings of the paper from all finished cells; with one seed, numbers alone.

    Reads artifacts/findings/*/*. Writes artifacts/findings/findings.json and metrics/findings.json;
    of a study with tables of its own those, to artifacts/findings/tables/.
    """
    from evaluation import beyond
    from evaluation import findings as stage
    from evaluation.variants import read_study

    study = read_study(variants)
    if study.tables:
        beyond.run(params, study, variants.stem)
    else:
        stage.run(params, study)


@app.command()
def inspect_cache(
    store: Annotated[str, typer.Argument(help="A store: a folder, or an fsspec URL.")],
    row: Annotated[int | None, typer.Option(help="Show this row.")] = None,
    caption: Annotated[str | None, typer.Option(help="Show the row of this caption.")] = None,
    image: Annotated[Path | None, typer.Option(help="Show the row of this picture.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
    table: Annotated[Path, typer.Option(help="The caption table of the store.")] = Path(
        "artifacts/captions/captions.parquet"
    ),
) -> None:
    """Show what a store holds: arrays, codecs, provenance, status; a row with its neighbours.

    Reads the store and the caption table. Writes nothing, or the page that --html names.
    """
    from stages import inspect_cache as command

    command.inspect(store, row=row, caption=caption, image=image, html=html, table=table)


@app.command()
def verify_cache(
    store: Annotated[str, typer.Argument(help="A store: a folder, or an fsspec URL.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode bad and failed rows again.")
    ] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Read a whole store again, name every bad shard and row, and exit with 1 if there is one.

    Reads the store. Writes nothing, or with --repair the bad rows.
    """
    from settings.params import read_params
    from stages import inspect_cache as command

    if not command.check(store, read_params(params), mend=repair):
        raise typer.Exit(1)


@app.command()
def join_stores(
    parts: Annotated[list[str], typer.Argument(help="The parts: folders, or fsspec URLs.")],
    to: Annotated[str, typer.Option(help="The store to make: a folder, or an fsspec URL.")],
) -> None:
    """Make one store of the parts that machines without a common disk have filled.

    Reads the parts, and compares every row with its checksum. Writes the store --to; killed, the
    same line goes on. At artifacts/features.zarr, `stages precompute-features` then takes it over.
    """
    from stages import parts as command

    command.join(parts, to)


@app.command()
def export_cache(
    store: Annotated[str, typer.Argument(help="A store: a folder, or an fsspec URL.")],
    out: Annotated[Path, typer.Argument(help="The file (parquet) or folder to write.")],
    to: Annotated[str, typer.Option(help="parquet, npy or webdataset.")],
) -> None:
    """Write the rows of a store for other tools, decoded and checked.

    Reads the store. Writes OUT, which must not be there yet.
    """
    from cache import export_store

    typer.echo(f"{out}: {export_store(store, out, to):,} rows")


@app.command()
def import_released(
    directory: Annotated[
        Path, typer.Argument(help="model_args.json, pretrained_ckpt.pth.tar, ...")
    ],
    params: ParamsFile = PARAMS,
) -> None:
    """Use a checkpoint in the layout of the released code: `dvc repro` then trains nothing.

    Reads the directory, the params file and artifacts/backbones. Writes `training.weights`, and the
    sizes that the checkpoint has, into the params file.
    """
    from stages import released_checkpoint as command

    command.import_released(directory, params)


@app.command()
def export_released(
    directory: Annotated[Path, typer.Argument(help="Folder to write to.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Write the trained heads in the layout of the released code.

    Reads artifacts/model and artifacts/decision. Writes the directory.
    """
    from settings.params import read_params
    from stages import released_checkpoint as command

    command.export_released(directory, read_params(params))


@app.command()
def make_pairs(
    prompts: Annotated[Path, typer.Argument(help="Prompts in PartiPrompts' TSV format.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("study"),
    params: ParamsFile = PARAMS,
) -> None:
    """Make a retrieved and a generated picture per prompt, for people to compare (appendix F).

    Reads the prompts, artifacts/model and artifacts/index. Writes the pictures and pairs.json to
    --out; `gill annotate` shows them.
    """
    _run("make_pairs", params, prompts=prompts, folder=out)


@app.command()
def sample(
    prompts: Annotated[
        Path, typer.Argument(help="GenEval's .jsonl, DPG-Bench's folder, PartiPrompts' TSV, lines.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    samples: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Sample s of prompt i: +1000 i + s.")] = 0,
    params: ParamsFile = PARAMS,
) -> None:
    """Generate pictures for a benchmark's prompts, named as its own scorer wants them.

    Reads the prompts and artifacts/model. Writes the pictures to --out, with sampling.json: what
    made them, and that no prompt was rewritten. Killed, the same line goes on.
    """
    _run("sample", params, prompts=prompts, folder=out, samples=samples, seed=seed)


def main() -> None:
    """The console script."""
    run_as_process(app)
