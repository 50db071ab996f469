"""What a params file says about the caption table and its check."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gill_errors import InputError

MAX_PIXELS = 48_000_000
"""Of one picture: 192 MB."""
CheckLevel = Literal["decode", "header", "exists"]
Quoting = Literal["auto", "quoted", "escaped", "literal"]


class ColumnParams(BaseModel):
    """Which columns of a table are meant, where their names do not say it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    caption: str | None = Field(
        default=None, description="null: caption, captions, text, title or txt"
    )
    image: str | None = Field(
        default=None,
        description="null: image, image_path, filepath, file_name, path, jpg, png or webp",
    )
    id: str | None = Field(default=None, description="null: id, where there is one")
    split: str | None = Field(default=None, description="null: split, where there is one")


class CaptionParams(BaseModel):
    """The parameters of the caption table and its check."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = Field(
        description="TSV, CSV, JSON, Parquet or tar shards (file, folder, glob, {00..99}), a "
        "folder of pictures with texts beside them, a data set of `datasets` or its hub id"
    )
    columns: ColumnParams = ColumnParams()
    quoting: Quoting = Field(
        default="auto",
        description="whether quotation marks around cells of a TSV or CSV belong to the file, with "
        'those inside doubled ("quoted") or after a backslash ("escaped"), or to the text '
        "(literal); auto: what the whole file agrees on",
    )
    encoding: str | None = Field(
        default=None,
        description="of a text table; null: UTF-8, or UTF-16 by its mark, throughout. Named, a row "
        "that is not in it is excluded",
    )
    several_captions: Literal["all", "first", "random"] = Field(
        default="all", description="which to take where a row lists several"
    )
    seed: int = Field(default=0, description="of `several_captions: random`")
    allow_download: bool = Field(
        default=False, description="whether a data set may be fetched from the hub"
    )
    images_dir: str | None = Field(
        default=None,
        description="what the table's image column is relative to; default: its folder",
    )
    check: CheckLevel = Field(
        default="decode",
        description="decode every picture whole, read its header, or see that it exists; only "
        "decode identifies a picture by its content rather than by size and time of change",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=178_956_970,
        description="larger pictures are excluded, and such as take as much memory",
    )
    max_caption_chars: int = Field(default=2000, ge=1, description="longer captions are excluded")
    val_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the images in split val, if the table has no split",
    )
    test_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of the images in split test, likewise"
    )
    allow_outside: bool = Field(
        default=False, description="accept absolute paths and paths that leave images_dir"
    )

    @model_validator(mode="after")
    def _leaves_something_to_train(self) -> CaptionParams:
        if self.val_fraction + self.test_fraction >= 1:
            raise InputError("val_fraction + test_fraction must be less than 1")
        return self
