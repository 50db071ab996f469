"""Verdicts, the claims behind them, and Tables 3 and 4 from the ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.published import published
from evaluation.report.html import Facts, Mark, Section, Table, Tone, Value
from evaluation.report.tables import Number, over_seeds, spread_note
from evaluation.report.words import METRICS
from evaluation.variants import BASELINE

_CLAIMS = {"greater": "better", "at_least": "equal or better", "equal": "equal"}
_TONES: dict[str, Tone] = {"seen": "good", "reversed": "bad", "not seen": "quiet"}
_OWN = ("recall", "macro_f1")
_SETS = {
    "captions": "one caption",
    "story_5": "story, 5 captions",
    "story_5_pictures": "story, 5 captions and 4 pictures",
}


def findings_section(content: Mapping[str, Any]) -> Section:
    """The verdicts as a table, and behind each its claims with their numbers."""
    seeds = len(content["cells"]["seeds"])
    if seeds > 1:
        note = f"{seeds} seeds; how they are judged stands below the verdicts."
    else:
        note = (
            "One seed: no verdict. `make findings` trains and measures every variant with five "
            "seeds (about an hour on two cores) and fills this table; below it are the numbers of "
            "the one seed."
        )
    overview = Table(
        "",
        ["finding of the paper", "oracle", "CLIP similarity", "own measure", "where"],
        [_overview(found) for found in content["findings"]],
    )
    details = [_details(found) for found in content["findings"]]
    extra = " ".join(content["cells"].get("notes", []))
    rule = Facts({"how a finding is judged": content["rule"]})
    return Section("findings", "Findings", f"{note} {extra}".strip(), [overview, *details, rule])


def ablation_tables(content: Mapping[str, Any]) -> list[Table]:
    """Tables 3 and 4 and section 5; without ablations they say how to get them."""
    rows = [over_seeds_of(row) for row in content.get("numbers", ())]
    if not any(variant != BASELINE for variant, _ in rows):
        note = "Ours: not measured yet; `make ablations` trains them (about ten minutes)."
        rows = []
    else:
        note = ""
    mappers = {
        "generator": "generator alone",
        "linear": "linear",
        "mlp": "3-layer MLP",
        "encoder": "transformer encoder",
        BASELINE: "GILLMapper",
    }
    tokens = {"r1": "r = 1", "r2": "r = 2", "r4": "r = 4", BASELINE: "r = 8"}
    others = {
        BASELINE: "GILL",
        "generation_only": "no retrieval loss",
        "released": "the released code's objective",
    }
    return [
        _ablation("Table 3: mapping networks", "table_3", mappers, rows, note),
        _ablation("Table 4: number of [IMG] tokens", "table_4", tokens, rows, note),
        _ablation("Section 5: what is minimised", "section_5", others, rows, note),
    ]


def over_seeds_of(row: Mapping[str, Any]) -> tuple[str, Number]:
    """Variant and number; the generator alone counts as a variant of its own."""
    variant = "generator" if row["method"] == "generator" else row["variant"]
    return variant, over_seeds(row)


def _ablation(
    title: str,
    table: str,
    names: Mapping[str, str],
    rows: Sequence[tuple[str, Number]],
    note: str,
) -> Table:
    ours = {
        (variant, one.set, one.metric): one
        for variant, one in rows
        if one.method in ("gill", "generator")
    }
    metrics = ("oracle_attributes", "clip_similarity", "fid")
    shown = [
        (set_, metric)
        for set_ in _SETS
        for metric in metrics
        if any(v in names and s == set_ and m == metric for v, s, m in ours)
        and any(n.value is not None for (_, s, m), n in ours.items() if (s, m) == (set_, metric))
    ]
    papers = [("captions", "fid"), ("story_5_pictures", "clip_similarity")]
    papers = [
        (set_, metric)
        for set_, metric in papers
        if any(published(table, set_, variant, metric) is not None for variant in names)
    ]
    columns = [""] + [f"{_SETS[set_]}: {METRICS[metric]}" for set_, metric in shown]
    columns += [f"paper, {'CC3M' if s == 'captions' else 'VIST'}: {METRICS[m]}" for s, m in papers]
    body: list[list[Value]] = []
    for variant, name in names.items():
        row: list[Value] = [name]
        row += [_number(ours.get((variant, *key))) for key in shown]
        for set_, metric in papers:
            value = published(table, set_, variant, metric)
            row.append(None if value is None else f"{value:g}")
        body.append(row)
    used = [one for (variant, _, _), one in ours.items() if variant in names]
    used = [one for one in used if (one.set, one.metric) in shown]
    return Table(title, columns, body, f"{note} {spread_note(used)}".strip())


def _number(one: Number | None) -> Value:
    if one is None or one.value is None:
        return None
    return f"{one.value:.3f}" if one.spread is None else f"{one.value:.3f} ± {one.spread:.3f}"


def _overview(found: Mapping[str, Any]) -> list[Value]:
    verdicts = found["verdicts"]
    own = next((verdicts[name] for name in _OWN if name in verdicts), "")
    return [
        f"{found['number']}. {found['statement']}",
        _verdict(verdicts.get("oracle_attributes", "")),
        _verdict(verdicts.get("clip_similarity", "")),
        _verdict(own),
        found["source"],
    ]


def _verdict(verdict: str | None) -> Value:
    """A mark; "" where this judge has nothing to say about a finding."""
    if verdict == "":
        return None
    return Mark(verdict or "no verdict", _TONES.get(verdict or "", "quiet"))


def _details(found: Mapping[str, Any]) -> Table:
    rows: list[list[Value]] = []
    for part in found["parts"]:
        title = part["title"] + (" (beside)" if part["beside"] else "")
        for metric in part["metrics"]:
            rows.append([title, METRICS[metric], *_claim_cells(part, part["by"].get(metric))])
            title = ""
    return Table(
        f"Finding {found['number']}: the numbers that decide it",
        ["claim: first against second", "measure", "claimed", "first", "second",
         "difference, 95% interval", "verdict", "paper: first / second"],
        rows,
        "First is claimed to be as stated, compared with second. What stands `beside` decides "
        "nothing.",
        folded=True,
    )  # fmt: skip


def _claim_cells(part: Mapping[str, Any], by: Mapping[str, Any] | None) -> list[Value]:
    claimed = _CLAIMS[part["claim"]]
    if by is None:
        return [claimed, None, None, Mark("not measured", "quiet"), None, part["paper"] or None]
    difference = f"{by['difference']:+.3f}"
    if by.get("low") is not None:
        difference += f" [{by['low']:+.3f}, {by['high']:+.3f}]"
    return [
        claimed,
        by["first"],
        by["second"],
        difference,
        _verdict(by["verdict"]),
        part["paper"] or None,
    ]
