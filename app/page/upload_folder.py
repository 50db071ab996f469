"""Gradio's folder on this server: made when this module is imported, which is before gradio is.

Gradio serves whatever lies in its folder. By default that is one for all programs and users of the
machine; this one is nobody else's, and is deleted with the process.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

_parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
_parent.mkdir(parents=True, exist_ok=True)
UPLOAD_FOLDER = Path(tempfile.mkdtemp(prefix="gill-", dir=_parent)).resolve()
os.environ["GRADIO_TEMP_DIR"] = str(UPLOAD_FOLDER)
atexit.register(shutil.rmtree, UPLOAD_FOLDER, ignore_errors=True)
