"""Commands `gill push` and `gill pull`: the trained part to and from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gill.model_card import CardNumber

Repository = Annotated[str, typer.Argument(help="OWNER/NAME; to push, NAME alone will do.")]


def push(
    repository: Repository,
    artifacts: Annotated[
        Path, typer.Option(help="Where the trained model lies.", file_okay=False)
    ] = Path("artifacts"),
    licence: Annotated[
        str | None, typer.Option(help="Of the trained part: an identifier such as apache-2.0.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
) -> None:
    """Send the trained part to the hub, with a model card that has the run's numbers.

    Frozen models, caches and the index stay here. The login is huggingface_hub's (`hf auth login`,
    or HF_TOKEN).
    """
    from gill.loading import Gill
    from pipeline.devices import quieten_libraries

    quieten_libraries()
    numbers = _card_numbers(artifacts / "evaluation" / "results.json")
    if not numbers:
        typer.secho("(no evaluation lies here: the card has no numbers)", dim=True, err=True)
    gill = Gill.load(artifacts, device="cpu")
    typer.echo(gill.push_to_hub(repository, private=private, numbers=numbers, licence=licence))


def pull(
    repository: Repository,
    out: Annotated[
        Path | None, typer.Option(help="The folder; default: the repository's NAME.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit; default: the newest.")
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Download its frozen models as well.")
    ] = False,
) -> None:
    """Download a trained part from the hub. Then: `gill ask --artifacts FOLDER ...`."""
    from gill import hub
    from pipeline.devices import quieten_libraries

    quieten_libraries()
    config, folder = hub.pull(repository, out or Path(repository.rpartition("/")[2]), revision)
    typer.echo(f"{folder}: {config.num_parameters:,} parameters, step {config.step:,}")
    for role, model in config.backbones.items():
        source = model.source or f"a directory of your own ({model.fingerprint[:12]})"
        typer.echo(f"  {role.replace('_', ' ')}: {source}")
    if frozen:
        hub.resolve_backbones(config, None, local_files_only=False)


def _card_numbers(results: Path) -> list[CardNumber]:
    """The headline numbers of the evaluation, where there is one."""
    from evaluation.headline import headline_results
    from evaluation.results import read_results
    from gill.model_card import CardNumber

    if not results.is_file():
        return []
    rows = read_results(results)
    baselines = {(row.set, row.metric): row.value for row in rows if row.method == "generator"}
    return [
        CardNumber(
            set=row.set,
            title=row.title,
            metric=row.metric,
            value=row.value,
            baseline=baselines.get((row.set, row.metric)),
            examples=row.examples,
        )
        for row in headline_results(rows).values()
        if row.value is not None
    ]
