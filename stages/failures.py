"""The errors that a person can mend: shown as one line, without a traceback."""

from __future__ import annotations


def expected_failures() -> tuple[type[Exception], ...]:
    """Every error type whose message says what was wrong, where, and what to do."""
    from pipeline.backbones import BackboneError
    from stages.params import ParamsError

    return (BackboneError, ParamsError)
