"""Command plots-page: a page for `dvc plots show` that needs no network."""

from __future__ import annotations

from pathlib import Path

from gill_errors import StageError

PAGE = Path(".dvc/plots.html")
"""What `html_template` in .dvc/config names."""

_TEMPLATE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<title>Curves</title>
<script>(() => {%s})();</script>
<style>
body {font-family: system-ui, sans-serif; margin: 2rem; color: #222; background: #fff}
table {border-spacing: 15px}
</style>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def write(path: Path = PAGE) -> None:
    """Write the page's template with Vega, Vega-Lite and Vega-Embed inside.

    Raises StageError where the package that holds them is not installed.
    """
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise StageError(
            "the curves' libraries come with vl-convert-python: pip install vl-convert-python"
        ) from None
    scripts = javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEMPLATE.replace("%s", scripts), encoding="utf-8")
