"""What is expensive, kept outside DVC's outputs and found by what decides it.

    WorkFolder   one folder: stores, trainings, indexes, evaluations of many workspaces
    Entry        one of them: a folder named by the fingerprint of what decides its numbers

    work/format.json
         KIND/KEY/decided_by.json     rows, weights, params, deciding code: the key is its hash
                  finished.json       written last: MD5 of each output, seconds, a summary
                  ...                 what is being made, or was
         locks/KIND-KEY.lock          who makes it now
         uses/WORKSPACE.json          which entries a workspace used last, by stage
         accepted.json                code whose edits were said to change no number

A stage asks for the entry of its inputs. A finished one is placed into `artifacts/` without
computing; an unfinished one is gone on with, however the stage was started; other inputs are
another entry, so nothing finished is ever overwritten. Only `stages work --prune` deletes.
This room knows no model, no store and no picture.
"""

from workfolder.code import accept_code, code_fingerprint, deciding_modules
from workfolder.deciding import accept_edits, code_of
from workfolder.entries import (
    ASIDE,
    Entry,
    WorkFolder,
    WorkFolderError,
    content_of,
    file_md5,
    place,
    place_link,
    write_json,
)
from workfolder.inputs import MOST_FILES, bring_from_repository, signature, watch_files
from workfolder.uses import EntryState, is_free, list_entries, prune
