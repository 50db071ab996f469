"""Which module's code decides what lies in the work folder, by kind of entry."""

from __future__ import annotations

from workfolder.code import accept_code, code_fingerprint
from workfolder.entries import WorkFolder

MODULES = {
    "miniature": "miniature.corpus",
    "features": "stages.feature_store",
    "candidates": "stages.feature_store",
    "targets": "stages.target_store",
    "replies": "stages.reply_store",
    "training": "stages.head_training",
    "index": "stages.candidate_index",
    "decision": "stages.decision_labels",
    "pictures": "evaluation.pictures",
    "evaluation": "evaluation.tables",
    "report": "evaluation.report.page",
}


def code_of(kind: str, work: WorkFolder) -> str:
    """Fingerprint of the code that decides entries of a kind."""
    return code_fingerprint(MODULES[kind], work)


def accept_edits(work: WorkFolder) -> list[str]:
    """Say that the code of today computes what the entries in use were computed with.

    Gives the kinds whose code had changed.
    """
    in_use = set(work.used().values())
    changed = []
    for entry in work.entries():
        if entry.name not in in_use or "code" not in entry.decided_by:
            continue
        # As it is, for what is said now; compared with what earlier edits were said to equal.
        ours = code_fingerprint(MODULES[entry.kind])
        if code_fingerprint(MODULES[entry.kind], work) != entry.decided_by["code"]:
            accept_code(work, ours, entry.decided_by["code"])
            changed.append(entry.kind)
    return sorted(set(changed))
