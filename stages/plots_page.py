"""Command plots-page: a page for `dvc plots show` that needs no network."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(".dvc/plots.html")
"""What `html_template` in .dvc/config names."""


def write(path: Path = PAGE) -> None:
    """Write the page's template with Vega, Vega-Lite and Vega-Embed inside."""
    from vl_convert import javascript_bundle

    scripts = javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    path.parent.mkdir(parents=True, exist_ok=True)
    template = Path(__file__).with_name("plots.html").read_text(encoding="utf-8")
    path.write_text(template.replace("%s", scripts), encoding="utf-8")
