"""How the tables are measured: those of the paper, on the miniature world or on the original files.

    examples (evaluation.sets) -> pictures of each method (evaluation.pictures, kept)
      -> scores (evaluation.scores) -> results.json, records.parquet

`TABLES` says what each table measures; a set that several tables share is measured once. Killed and
run again, the stage goes on after the last finished batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evaluation import sets
from evaluation.ceilings import oracle_ceiling
from evaluation.chat_answers import ChatAnswers
from evaluation.chat_turns import (
    asked_set,
    held_out_questions,
    held_out_turns,
    measure_turns,
)
from evaluation.decision import table_6
from evaluation.follow_ups import measure_follow_ups
from evaluation.headline import MAIN, headline, of_every_set
from evaluation.latency import latency
from evaluation.memory import fact_scores, memory
from evaluation.pictures import Method, PictureMaker, opened, picture_crew
from evaluation.published import published
from evaluation.results import Record, Result, write_records, write_results
from evaluation.retrieval import caption_retrieval, table_5
from evaluation.scores import Found, PictureScorer, Rows
from evaluation.sets import EvaluationSet
from evaluation.sources import Sources
from evaluation.store import EvaluationStore
from evaluation.texts import captioning, visual_questions
from evaluation.told_stories import tell_stories
from evaluation.unseen_prompts import unseen_prompts
from gill.artifacts import Artifacts
from gill.frozen import read_backbones
from gill.loading import Gill
from pipeline.bridge.checkpoint import CHECKPOINTS, fingerprint_heads
from pipeline.devices import set_up
from pipeline.settings import GenerationSettings
from pipeline.talking.reading import read_contexts
from settings.params import Params
from workfolder import WorkFolder, code_of, place, write_json

SetsOf = Callable[[Sources, Params], Iterable[EvaluationSet]]

GENERATED: dict[str, SetsOf] = {
    "captions": lambda s, p: [sets.caption_set(s.captions, p.evaluation.captions)],
    "table_1": lambda s, p: sets.table_1(s.stories, p.evaluation.vist.limit),
    "table_2": lambda s, p: sets.table_2(s.dialogues, p.evaluation.visdial.limit),
    "table_3": lambda s, p: _ablation_sets(s, p),
    "table_4": lambda s, p: _ablation_sets(s, p),
    "table_8": lambda s, p: [sets.table_8(s.coco_2014, p.evaluation)],
    "figure_6": lambda s, p: sets.figure_6(s.stories, p.evaluation.vist.limit),
    "figure_8": lambda s, p: sets.figure_8(s.dialogues, p.evaluation.visdial.limit),
    "memory": lambda s, p: memory(s.captions, p.evaluation.captions),
    "chat": lambda s, p: _chat_sets(s, p),
}
"""Tables whose pictures are generated, and from what."""


def measure_tables(params: Params, artifacts: Artifacts, work: WorkFolder, folder: Path) -> None:
    """Write `folder`/evaluation (results, records, pictures) and the headlines beside it.

    Pictures and texts are kept in the work folder as they are made, whatever happens to the rest.

    Raises ParamsError for a table whose files are not named or not there, and what the readers say
    of them, before any model is loaded.
    """
    sources = Sources(params, artifacts)
    tables = params.evaluation_tables
    # Planned and read before any model is loaded: a table that lacks a file is refused at once.
    plan = {name: list(GENERATED[name](sources, params)) for name in tables if name in GENERATED}
    sources.read(tables)
    run_ = _Run(params, artifacts, sources, work)
    results: list[Result] = []
    said: set[str] = set()
    with run_.crew:
        for table in tables:
            rows = [
                replace(
                    row, table=table, published=published(table, row.set, row.method, row.metric)
                )
                for row in run_.measure(table, plan.get(table, []))
            ]
            _print(table, rows, said)
            results += rows
    out = folder / "evaluation"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed while it was written
    records = [_placed(record, out, artifacts.evaluation, run_.makers) for record in run_.records]
    write_records(out / "records.parquet", records)
    write_results(out / "results.json", results)
    write_json(folder / "evaluation.json", of_every_set(results))
    write_json(folder / "gill.json", headline(results))


def _placed(record: Record, out: Path, final: Path, makers: Mapping[str, Path]) -> Record:
    """The record with its generated pictures beside it: in `out`, which will lie at `final`."""

    def placed(picture: str) -> str:
        for method, folder in makers.items():
            if Path(picture).is_relative_to(folder):
                inside = Path("pictures", method, Path(picture).relative_to(folder))
                place(Path(picture), out / inside)
                return str(final / inside)
        return picture

    pictures = {
        method: placed(picture) if method in makers else picture
        for method, picture in record.pictures.items()
    }
    context = tuple(
        {kind: placed(p) if kind in ("picture", "answer") else p for kind, p in part.items()}
        for part in record.context
    )
    return replace(record, pictures=pictures, context=context)


class _Run:
    """The loaded models with what they have made before, and what was measured so far."""

    def __init__(
        self, params: Params, artifacts: Artifacts, sources: Sources, work: WorkFolder
    ) -> None:
        device, section = set_up(params.run.device, params.run.threads), params.evaluation
        heads = fingerprint_heads(artifacts.model / CHECKPOINTS[params.training.checkpoint])
        gill = Gill.load(artifacts, device=str(device), checkpoint=params.training.checkpoint)
        backbones = read_backbones(artifacts)
        frozen = {role: f"{model.fingerprint} {model.dtype}" for role, model in backbones}
        for guard in ("safety_checker", "watermark"):  # they change pixels, where they are there
            if getattr(backbones.image_generator, guard):
                frozen["image_generator"] += f" {guard}"
        made_by = {
            "generator": {"image_generator": frozen["image_generator"]},
            "gill": {"heads": heads, **frozen},
        }
        self.makers: dict[str, Path] = {}
        for method, models in made_by.items():
            # Pictures are found by the models that draw them, not by this stage's params: other
            # tables, limits or metrics find them again.
            entry = work.entry(
                "pictures", {"method": method, **models, "code": code_of("pictures", work)}
            )
            entry.begin()
            work.note_use(artifacts.stage(f"evaluate.{method}"), entry)
            self.makers[method] = entry.folder
        self.params, self.artifacts, self.sources, self.gill = params, artifacts, sources, gill
        self.store = EvaluationStore(self.makers)
        self.scorer = PictureScorer(gill.encoder, section)
        self.crew = picture_crew(gill, artifacts, params, heads)
        self.records: list[Record] = []
        self._measured: dict[tuple[str, str], list[Result]] = {}

    def measure(self, table: str, plan: Sequence[EvaluationSet]) -> list[Result]:
        """The results of one table."""
        section, sources = self.params.evaluation, self.sources
        settings = section.settings_for(table, self.params.generation_settings)
        if table == "chat":
            return self._chat(plan, settings)
        if table in GENERATED:
            return [row for one in plan for row in self._generated(one, settings)]
        if table == "retrieval":
            return caption_retrieval(self.gill, sources, section)
        if table == "table_5":
            return table_5(self.gill, sources.stories, section)
        if table == "table_6":
            return table_6(self.artifacts.decision, section.seed)
        if table == "table_7":
            return self._table_7()
        if table == "stories_told":
            return self._stories_told(settings)
        if table == "unseen_prompts":
            return unseen_prompts(
                self.gill,
                self.artifacts.decision,
                self.artifacts.miniature / "truth.json",
                section.seed,
                lambda one: self._maker().make(one, "gill", settings),
            )
        [example] = sets.caption_set(sources.captions, 1).examples
        return latency(self.gill, example.prompt, settings, section.seed)

    def _generated(self, one: EvaluationSet, settings: GenerationSettings) -> list[Result]:
        """Make and score the pictures of a set, unless another table has already."""
        # Tables share sets (captions stand in three), but not always their sampling.
        known = (one.name, settings.model_dump_json())
        if known in self._measured:
            return self._measured[known]
        section = self.params.evaluation
        maker = self._maker()
        pictures: dict[str, list[Path]] = {
            method: maker.make(one, method, settings) for method in section.methods
        }
        found = self.scorer.score(one, pictures)
        for method, paths in pictures.items():
            found[method].values |= fact_scores(one, paths)
        rows = Rows(one.name, one.title, len(one.examples), one.of, section.seed)
        results = [
            replace(row, ceiling=oracle_ceiling(one, method))
            if row.metric == "oracle_attributes"
            else row
            for method in found
            for row in rows.results(method, found[method])
        ]
        self.records += self._records(one, pictures, found)
        self._measured[known] = results
        return results

    def _stories_told(self, settings: GenerationSettings) -> list[Result]:
        def make(one: EvaluationSet, method: Method, first: int) -> list[Path]:
            return self._maker(first).make(one, method, settings)

        told = tell_stories(
            self.gill, self.sources.stories, self.params.evaluation, make, self.scorer
        )
        self.records += told.records
        return told.results

    def _maker(self, first: int = 0) -> PictureMaker:
        """Makes pictures, the first with this seed above `evaluation.seed`."""
        seed = self.params.evaluation.seed + first
        return PictureMaker(self.crew, self.store, seed, self._read_prompt)

    def _chat(self, plan: Sequence[EvaluationSet], settings: GenerationSettings) -> list[Result]:
        """Bare captions, the same asked for in other words, the choice, words kept, follow-ups."""
        section, [_, asked] = self.params.evaluation, plan
        maker = self._maker()
        results = [row for one in plan for row in self._generated(one, settings)]
        answers = ChatAnswers(self.gill, self.store)
        turns = held_out_turns(asked, held_out_questions(self.params.training.replies), section)
        for rows, records in (
            measure_turns(answers, turns, section),
            measure_follow_ups(
                self.gill,
                asked,
                section,
                settings,
                self.store,
                lambda one, method: maker.make(one, method, settings),
            ),
        ):
            results += rows
            self.records += records
        return results

    def _read_prompt(self, prompt: str) -> list[list[int]]:
        """What the generator's own text side, loaded when it is first asked, reads of a prompt."""
        assert self.gill.conditioner is not None, "Gill.load gives one"
        return self.gill.conditioner().read(prompt)

    def _records(
        self,
        one: EvaluationSet,
        pictures: dict[str, list[Path]],
        found: dict[str, Found],
    ) -> list[Record]:
        retrieved = self._retrieved(one)
        records = []
        for index, example in enumerate(one.examples):
            scores = {
                f"{method}.{metric}": values[index]
                for method, scores in found.items()
                for metric, values in scores.values.items()
            }
            made = {method: str(paths[index]) for method, paths in pictures.items()}
            # Only the examples that are shown have a retrieved picture.
            if index < len(retrieved):
                image, scores["retrieved.similarity"] = retrieved[index]
                made |= {"retrieved": image} if image is not None else {}
            records.append(
                Record(
                    set=one.name,
                    id=example.id,
                    prompt=example.prompt,
                    context=example.described,
                    real=example.real,
                    scene=None if example.scene is None else " ".join(example.scene),
                    pictures=made,
                    scores=scores,
                )
            )
        return records

    def _retrieved(self, one: EvaluationSet) -> list[tuple[str | None, float]]:
        """The nearest candidate of the first examples, which the report shows."""
        gill = self.gill
        if gill.index is None:
            return []
        shown = one.examples[: self.params.evaluation.examples_shown]
        hidden = read_contexts(gill.model, gill.encoder, [opened(e.context) for e in shown])
        found = gill.index.search(gill.model.text_query(hidden).float().cpu(), 1)
        return [(hits[0].image, hits[0].score) for hits in found]

    def _table_7(self) -> list[Result]:
        section, sources = self.params.evaluation, self.sources
        halves: list[tuple[list[Result], list[Record]]] = []
        if sources.has("coco"):
            halves.append(captioning(self.gill, sources.coco, section, self.store))
        if sources.has("vqa"):
            halves.append(visual_questions(self.gill, sources.questions, section, self.store))
        self.records += [record for _, records in halves for record in records]
        return [row for rows, _ in halves for row in rows]


def _chat_sets(sources: Sources, params: Params) -> list[EvaluationSet]:
    bare = sets.caption_set(sources.captions, params.evaluation.captions)
    return [bare, asked_set(bare)]


def _ablation_sets(sources: Sources, params: Params) -> list[EvaluationSet]:
    """Tables 3 and 4: captions (FID on CC3M val) and stories with five captions and four pictures
    (CLIP similarity), with other mapping networks and numbers of [IMG] tokens. Section 5."""
    section = params.evaluation
    return [
        sets.caption_set(sources.captions, section.captions),
        sets.story_set(sources.stories, 5, pictures=True, limit=section.vist.limit),
    ]


def _print(table: str, rows: Sequence[Result], said: set[str]) -> None:
    """One line per set for people: every method's main numbers, ceilings; each reason once."""
    for name in dict.fromkeys(row.set for row in rows):
        own = [row for row in rows if row.set == name]
        numbers = ", ".join(
            f"{row.method} {row.metric} {row.value:.3g}"
            + ("" if row.ceiling is None else f" (ceiling {row.ceiling:.3g})")
            for row in own
            if row.value is not None and row.metric in (*MAIN, *_SPEEDS)
        )
        print(f"{table}, {own[0].title} ({own[0].examples} of {own[0].of}): {numbers}")
    for row in rows:
        if row.absent and row.absent not in said:
            said.add(row.absent)
            print(f"  {row.metric} is absent: {row.absent}")


_SPEEDS = ("tokens_per_second", "seconds")
