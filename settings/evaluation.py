"""Section `evaluation` of params.yaml: which tables are measured, on which files."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from gill_records import Record
from pipeline.settings import GenerationSettings

TableName = Literal[
    "captions",
    "retrieval",
    "table_1",
    "table_2",
    "table_3",
    "table_4",
    "table_5",
    "table_6",
    "table_7",
    "table_8",
    "figure_6",
    "figure_8",
    "stories_told",
    "chat",
    "latency",
]


class EvaluationFiles(Record):
    """A data set on its original files; on the miniature world null means the drawn ones."""

    limit: int | None = Field(None, ge=1, description="examples to take; null: all there are")

    @property
    def missing(self) -> list[str]:
        """Keys of files that are not named."""
        files = self.model_dump(exclude={"limit"})
        return [name for name, value in files.items() if value is None]

    @property
    def named(self) -> bool:
        """Whether any file is named."""
        return len(self.missing) < len(type(self).model_fields) - 1


class VistFiles(EvaluationFiles):
    """Stories of Tables 1, 3 to 5 and Figure 6, and those that are told."""

    stories: str | None = Field(None, description="story-in-sequence JSON; the paper: val")
    images: str | None = Field(None, description="folder of its pictures, PHOTO_ID.jpg or .png")


class VisDialFiles(EvaluationFiles):
    """Dialogues of Table 2 and Figure 8."""

    dialogues: str | None = Field(None, description="VisDial 1.0 JSON; the paper: val")
    images: str | None = Field(None, description="folder of its pictures (VisualDialog_val2018)")


class CocoFiles(EvaluationFiles):
    """Captions of Table 7."""

    captions: str | None = Field(None, description="captions_*.json")
    images: str | None = Field(None, description="folder of its pictures")


class Coco2014Files(CocoFiles):
    """Captions of Table 8."""

    limit: int | None = Field(
        30_000, ge=1, description="captions drawn at random (Table 8); null: all there are"
    )


class VqaFiles(EvaluationFiles):
    """Questions of Table 7."""

    questions: str | None = Field(None, description="VQAv2 questions JSON; the paper: val")
    annotations: str | None = Field(None, description="their annotations JSON")
    images: str | None = Field(None, description="folder of COCO pictures")


class GenerationOverride(Record):
    """What one table samples differently from `generation`."""

    steps: int | None = Field(None, ge=1, description="null: generation.steps")
    guidance: float | None = Field(None, ge=1, description="null: generation.guidance")
    scheduler: Literal["pipeline", "ddim", "dpm-solver", "euler"] | None = Field(
        None, description="null: generation.scheduler"
    )


# Appendix E.3: "a classifier-free guidance scaling factor of 3.0 and 250 DDIM inference steps".
PAPER_GENERATION = {"table_8": GenerationOverride(steps=250, guidance=3.0, scheduler="ddim")}

# Which files each table reads; of two groups for Table 7, one is enough.
TABLE_FILES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("table_1", "table_3", "table_4", "table_5", "figure_6", "stories_told"), ("vist",)
    ),
    **dict.fromkeys(("table_2", "figure_8"), ("visdial",)),
    "table_7": ("coco", "vqa"),
    "table_8": ("coco_2014",),
}
_ABLATIONS = ("table_3", "table_4")


class EvaluationParams(Record):
    """Which tables of the paper are measured, on which files, and where pictures are generated."""

    tables: tuple[TableName, ...] | None = Field(
        None,
        description="null: on the miniature world all but the ablations (table_3, table_4), and "
        "table_8 where `generation.table_8` says with how many steps (the paper's 250 take hours "
        "here); otherwise what the named files allow; `chat` of a chat model alone",
    )
    methods: tuple[Literal["generator", "gill"], ...] = Field(
        ("generator", "gill"),
        min_length=1,
        description="who generates; `generator` alone, with its own text encoder, is the baseline",
    )
    captions: int = Field(100, ge=1, description="test captions of the run's own caption table")
    told_stories: int = Field(
        30, ge=1, description="stories that get pictures behind their sentences (stories_told)"
    )
    chat_turns: int = Field(
        200,
        ge=2,
        description="held-out turns of the table chat: half requests for pictures, half questions",
    )
    vist: VistFiles = VistFiles()
    visdial: VisDialFiles = VisDialFiles()
    coco: CocoFiles = Field(CocoFiles(), description="captioning of Table 7; the paper: val 2017")
    coco_2014: Coco2014Files = Field(Coco2014Files(), description="Table 8; the paper: val 2014")
    vqa: VqaFiles = VqaFiles()
    check: Literal["decode", "header", "exists"] = Field(
        "decode", description="how each of their pictures is checked before anything is generated"
    )
    generation: dict[TableName, GenerationOverride] = Field(
        {}, description="per table, what differs from `generation`; Table 8 has the paper's"
    )
    lpips_weights: str | None = Field(
        None, description="AlexNet of LPIPS, see evaluation.metrics.images; null: LPIPS is absent"
    )
    inception_weights: str | None = Field(
        None, description="Inception of FID, see evaluation.metrics.images; null: FID is absent"
    )
    retrieval_scenes: int = Field(
        500, ge=2, description="miniature scenes for recall@k of complete captions"
    )
    examples_shown: int = Field(12, ge=1, description="rows per grid of the report")
    seed: int = Field(0, ge=0, description="of the pictures: example i has seed + i; and of draws")

    def chosen(self, miniature: bool, chat: bool = False) -> tuple[TableName, ...]:
        """The tables to measure, on the miniature world or not, of a chat model or not."""
        if self.tables is not None:
            return tuple(dict.fromkeys(self.tables))
        names: tuple[TableName, ...] = get_args(TableName)
        if miniature:
            left_out = {*_ABLATIONS, *({"table_8"} - set(self.generation))}
            left_out |= set() if chat else {"chat"}
            return tuple(name for name in names if name not in left_out)
        named = [n for n in names if n in TABLE_FILES and n not in _ABLATIONS]
        own: list[TableName] = ["captions", "retrieval", "table_6", "latency"]
        own += ["chat"] if chat else []
        own += [n for n in named if any(getattr(self, g).named for g in TABLE_FILES[n])]
        return tuple(name for name in names if name in own)

    def settings_for(self, table: str, base: GenerationSettings) -> GenerationSettings:
        """`base` with what the paper and then these params say of this table."""
        changes: dict[str, object] = {}
        for overrides in (PAPER_GENERATION, self.generation):
            if table in overrides:
                changes |= overrides[table].model_dump(exclude_none=True)  # type: ignore[index]
        return base.model_copy(update=changes)

    def files(self) -> dict[str, str]:
        """Every file and folder that is named, by its key."""
        named = {"lpips_weights": self.lpips_weights, "inception_weights": self.inception_weights}
        for group in type(self).model_fields:
            section = getattr(self, group)
            if isinstance(section, EvaluationFiles):
                paths = section.model_dump(exclude={"limit"})
                named |= {f"{group}.{key}": path for key, path in paths.items()}
        return {key: path for key, path in named.items() if path is not None}

    def unnamed_files(self, miniature: bool) -> list[str]:
        """One line per file that a chosen table needs and that no key names."""
        lines = []
        for table in self.chosen(miniature):
            groups = TABLE_FILES.get(table, ())
            named = [group for group in groups if getattr(self, group).named]
            if not named and miniature:
                continue
            for group in named or groups:
                lines += [
                    f"evaluation.{group}.{key}: {table} reads it, and it is not named"
                    for key in getattr(self, group).missing
                ]
        return list(dict.fromkeys(lines))
