"""Library versions, as provenance."""

from __future__ import annotations

from importlib.metadata import version


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions by name."""
    return {name: version(name) for name in names}
