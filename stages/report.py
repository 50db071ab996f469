"""Stage report: what the other stages wrote, on one page."""

from __future__ import annotations

from evaluation.report.page import write_page
from settings.params import Params


def run(params: Params) -> None:
    """Write artifacts/report/index.html."""
    write_page(params)
