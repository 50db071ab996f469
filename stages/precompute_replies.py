"""Stage precompute-replies: the frozen chat model's own answers, which training keeps."""

from __future__ import annotations

import time
from pathlib import Path

from corpora.caption_table import CaptionTable
from gill.artifacts import ARTIFACTS, INPUTS
from gill.dimensions import check_dimensions
from settings.params import Params
from settings.replies import OWN_QUESTIONS
from stages.models_in_use import frozen_in_use
from stages.required import required, write_without_content
from workfolder import (
    WorkFolder,
    bring_from_repository,
    code_of,
    file_md5,
    place,
    watch_files,
)


def run(params: Params) -> None:
    """Make artifacts/replies/replies.jsonl; one without any where training takes none."""
    section, target = params.training.replies, ARTIFACTS.replies
    own = section.questions == OWN_QUESTIONS
    named = {"questions": None if own else section.questions}
    bring_from_repository(named.values())
    watch_files(INPUTS / "replies", named)
    if not params.needs_replies:
        write_without_content(target)
        print("nothing to do: training.mixture takes no answers of the frozen model")
        return
    check_dimensions(ARTIFACTS, (), params)
    work = WorkFolder.open(params.run.work)
    captions = required(ARTIFACTS.captions, "prepare-captions")
    decided_by = {
        "language_model": frozen_in_use(ARTIFACTS)["language_model"],
        "replies": section.model_dump(mode="json", exclude={"held_out"} if own else set()),
        # Rows count only where pictures of theirs are asked for.
        "captions": file_md5(captions) if section.joined else None,
        "questions": None if own else file_md5(Path(section.questions)),
        "code": code_of("replies", work),
    }
    entry = work.entry("replies", decided_by)
    with entry.alone():
        if entry.finished is None:
            from gill.frozen import read_backbones
            from stages.reply_store import make_replies

            if why := entry.explain_absence("replies"):
                print(f"replies: {why}")
            entry.begin()
            began = time.monotonic()
            replies = make_replies(
                entry.folder / target.name,
                section,
                CaptionTable(captions),
                read_backbones(ARTIFACTS).language_model,
                params.run,
            )
            cut = sum(not reply.ended for reply in replies)
            entry.finish([target.name], time.monotonic() - began, replies=len(replies), cut=cut)
    summary = entry.finished["summary"] if entry.finished else {}
    print(
        f"{summary['replies']:,} replies, {summary['cut']:,} of them cut after "
        f"{section.max_tokens} tokens, lie in {entry.folder}"
    )
    place(entry.folder / target.name, target)
    entry.work.note_use("replies", entry)
