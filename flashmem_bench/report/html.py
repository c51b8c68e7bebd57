"""One plain page that holds the whole report: tables, figures, findings, definitions.

The page loads nothing: figures are embedded, the style sheet is inline, there is no script. Every text that a model
or a data set wrote goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench import __version__
from flashmem_bench.published import published_scores
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import FLASHMEM, VANILLA, Cell, partner
from flashmem_bench.report.claim_views import claims_view, findings, labels_of, tests_made
from flashmem_bench.report.cost_views import latency_view
from flashmem_bench.report.figures import ABLATION_SHEET
from flashmem_bench.report.pages import page_environment
from flashmem_bench.report.style import CPU_STAMP
from flashmem_bench.schema import SCHEMA_VERSION, TABLES

if TYPE_CHECKING:
    import pandas as pd

    from flashmem_bench.report.figures import Drawing
    from flashmem_bench.report.stories import Story

BUNDLED = "flashmem-tiny"
_SHOWN_LETTERS = 1500
_DEFINED = (
    "score",
    "delta_vanilla",
    "triggers_mean",
    "latents_mean",
    "trigger_rate",
    "above_tau_rate",
    "ms_per_token",
    "decode_ms_per_token",
    "time_ratio",
    "decode_time_ratio",
    "overhead_share",
    "truncated_rate",
    "no_answer_rate",
    "same_text_share",
    "harness_share",
)

Context = dict[str, Any]


def render(
    cells: Sequence[Cell],
    tables: dict[str, pd.DataFrame],
    drawings: Sequence[Drawing],
    warnings: Sequence[str],
    stories: Sequence[Story] = (),
) -> str:
    """The page as a string.

    Args:
        cells: the cells behind the tables, for texts and provenance.
        tables: all tables of the schema.
        drawings: figures on disk; they are read and embedded.
        warnings: sentences that stand above the results.
        stories: pages of single samples, linked from their suite.
    """
    suites = sorted({cell.suite for cell in cells})
    models = sorted({str(cell.rows[0].get("model")) for cell in cells})
    context = {
        "version": __version__,
        "schema_version": SCHEMA_VERSION,
        "models": models,
        "bundled": BUNDLED in models,
        "bundled_name": BUNDLED,
        "cpu_stamp": CPU_STAMP if any(cell.rows[0].get("device") == "cpu" for cell in cells) else "",
        "samples": sum(len(cell.rows) for cell in cells),
        "cells": [_provenance(cell) for cell in cells],
        "tests": tests_made(tables["comparisons"]),
        "claims": claims_view(tables["claims"]),
        "findings": [
            finding for suite in suites for finding in findings(suite, tables["comparisons"], labels_of(cells))
        ],
        "warnings": list(warnings),
        "suites": [_suite(suite, cells, tables, drawings) for suite in suites],
        "stories": {suite: _stories(suite, stories) for suite in suites},
        "latency": latency_view(tables["latency"]),
        "latency_figures": [_figure(drawing) for drawing in drawings if drawing.kind == "latency"],
        "training": [_figure(drawing) for drawing in drawings if drawing.kind == "training"],
        "ablations": _ablations(tables["ablations"], drawings),
        "definitions": [column for column in TABLES["runs"] if column.name in _DEFINED],
    }
    return page_environment().get_template("report.html.j2").render(context)


def _suite(suite: str, cells: Sequence[Cell], tables: dict[str, pd.DataFrame], drawings: Sequence[Drawing]) -> Context:
    runs = tables["runs"]
    main = runs[(runs["suite"] == suite) & (runs["role"] == "main")]
    comparisons = tables["comparisons"]
    placebo = comparisons[(comparisons["suite"] == suite) & (comparisons["kind"] == "placebo")]
    baseline = comparisons[comparisons["kind"] == "baseline"]
    verdicts = dict(zip(baseline["cell_a"], baseline["verdict"], strict=True))
    names = ["model", "device", "dtype", "batch_size", "exec"]
    return {
        "name": suite,
        "groups": [
            _group(part.to_dict("records"), verdicts) for _, part in main.groupby(names, sort=True, dropna=False)
        ],
        "published": _published(suite),
        "placebos": [_placebo_row(row) for row in placebo.to_dict("records")],
        "placebo_stamp": CPU_STAMP if (main["device"] == "cpu").any() else "",
        "seeds": [_seed_row(row) for row in tables["seeds"].to_dict("records") if row["suite"] == suite],
        "strata": _strata(suite, tables["strata"], main),
        "figures": [_figure(drawing) for drawing in drawings if drawing.suite == suite and drawing.kind != "ablation"],
        "examples": _examples(suite, cells),
    }


def _stories(suite: str, stories: Sequence[Story]) -> list[Context]:
    """Links to the pages of single samples, by method."""
    here = [story for story in stories if story.suite == suite]
    return [
        {"method": method, "pages": [story for story in here if story.method == method]}
        for method in dict.fromkeys(story.method for story in here)
    ]


def _group(rows: list[Context], verdicts: dict[str, str]) -> Context:
    first = rows[0]
    marked = any(say.known(row["trigger_precision"]) or say.known(row["trigger_recall"]) for row in rows)
    return {
        "conditions": f"{first['model']}, {first['device']}, {first['dtype']}, batch {first['batch_size']}, "
        f"{first['exec']}",
        "stamp": CPU_STAMP if first["device"] == "cpu" else "",
        "marked": marked,
        "failures": any(say.known(row["error_rate"]) and row["error_rate"] > 0 for row in rows),
        "published": any(say.known(row["published_score"]) for row in rows),
        "reused": any(say.known(row["reused_share"]) and row["reused_share"] > 0 for row in rows),
        "rows": [_run_row(row, verdicts.get(row["cell"], "")) for row in rows],
    }


def _run_row(row: Context, verdict: str) -> Context:
    return {
        "method": row["method"],
        "settings": row["settings"] if say.known(row["settings"]) else "",
        "n": say.whole(row["n"]),
        "score": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
        "published": say.percent_interval(row["published_score"], None, None),
        "delta": say.points(row["delta_vanilla"], row["delta_low"], row["delta_high"]),
        "verdict": verdict if say.known(row["delta_vanilla"]) else "",
        "triggers": say.number(row["triggers_mean"], 2),
        "latents": say.number(row["latents_mean"], 2),
        "ms_per_token": say.interval(row["ms_per_token"], row["ms_per_token_low"], row["ms_per_token_high"]),
        "decode_ms_per_token": say.number(row["decode_ms_per_token"]),
        "ratio": f"{say.times(row['time_ratio'])} / {say.times(row['decode_time_ratio'])}",
        "truncated": say.share(row["truncated_rate"]),
        "no_answer": say.share(row["no_answer_rate"]),
        "failed": say.share(row["error_rate"]),
        "precision": say.share(row["trigger_precision"]),
        "recall": say.share(row["trigger_recall"]),
        "reused": f"{say.number(row['positions_encoded_mean'])} / {say.share(row['reused_share'])}",
        "same": _same(row),
    }


def _same(row: Context) -> str:
    if not say.known(row["same_text_share"]):
        return say.DASH
    if row["same_text_share"] < 1:
        return say.share(row["same_text_share"])
    why = row["why_equal"] if say.known(row["why_equal"]) else ""
    if not why and row["triggers_mean"] == 0:
        why = "no trigger"
    return f"all: {why or 'reason not recorded'}"


def _published(suite: str) -> list[Context]:
    """The paper's scores on a suite, one entry a backbone."""
    here = [row for row in published_scores() if row.suite == suite]
    told = {name: [row for row in here if row.backbone == name] for name in dict.fromkeys(row.backbone for row in here)}
    return [
        {"backbone": name, "scores": ", ".join(f"{row.method} {100 * row.value:.1f}" for row in rows)}
        for name, rows in told.items()
    ]


def _placebo_row(row: Context) -> Context:
    return {
        "placebo": row["b"],
        "n": say.whole(row["n"]),
        "difference": say.points(row["difference"], row["low"], row["high"]),
        "changed": f"{say.whole(row['fixed'])} / {say.whole(row['broken'])}",
        "p": say.p_value(row["p_value"]),
        "verdict": row["verdict"],
        "ratio": f"{say.times(row['time_ratio'])} / {say.times(row['decode_time_ratio'])}",
        "same": say.share(row["same_text_share"]),
    }


def _seed_row(row: Context) -> Context:
    return {
        "method": row["method"],
        "scope": row["checkpoint_scope"],
        "seeds": ", ".join(
            f"{seed}: {say.percent(float(score))}"
            for seed, score in zip(row["train_seeds"].split(","), row["seed_scores"].split(","), strict=True)
        ),
        "n": say.whole(row["n"]),
        "score": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
        "within": say.percent(row["within_run_se"], 2),
        "between": say.percent(row["between_seed_sd"], 2),
        "delta": say.points(row["delta_vanilla"], row["delta_low"], row["delta_high"]),
    }


def _strata(suite: str, strata: pd.DataFrame, main: pd.DataFrame) -> Context | None:
    here = strata[strata["suite"] == suite]
    names = list(dict.fromkeys(here["stratum"]))
    if len(names) < 2:
        return None
    scores = {(row["cell"], row["stratum"]): row for row in here.to_dict("records")}
    rows = []
    for run in main.to_dict("records"):
        found = [scores.get((run["cell"], name)) for name in names]
        rows.append(
            {
                "method": run["method"],
                "settings": run["settings"] if say.known(run["settings"]) else "",
                "scores": [
                    f"{say.percent_interval(one['score'], one['score_low'], one['score_high'])} (n {one['n_scored']})"
                    if one
                    else say.DASH
                    for one in found
                ],
            }
        )
    return {"names": names, "rows": rows}


def _ablations(ablations: pd.DataFrame, drawings: Sequence[Drawing]) -> list[Context]:
    sheets = []
    for (axis, suite, method, reference), rows in ablations.groupby(ABLATION_SHEET, sort=True, dropna=False):
        sheets.append(
            {
                "axis": axis,
                "suite": suite,
                "method": method,
                "reference": reference if say.known(reference) else "",
                "stamp": CPU_STAMP if (rows["device"] == "cpu").any() else "",
                "rows": [_ablation_row(row) for row in rows.to_dict("records")],
                "figures": [
                    _figure(drawing)
                    for drawing in drawings
                    if drawing.kind == "ablation"
                    and drawing.suite == suite
                    and drawing.subject == (axis, method, str(reference))
                ],
            }
        )
    return sheets


def _ablation_row(row: Context) -> Context:
    return {
        "value": row["value"],
        "reference": bool(row["reference"]),
        "n": say.whole(row["n"]),
        "score": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
        "delta": say.points(row["delta_reference"], row["delta_low"], row["delta_high"]),
        "trigger_rate": say.share(row["trigger_rate"]),
        "above": say.share(row["above_tau_rate"]),
        "triggers": say.number(row["triggers_mean"], 2),
        "ms": say.interval(row["decode_ms_per_token"], row["decode_ms_per_token_low"], row["decode_ms_per_token_high"]),
        "e2e": say.interval(row["e2e_ms_median"], row["e2e_ms_low"], row["e2e_ms_high"]),
    }


def _figure(drawing: Drawing) -> Context:
    data = base64.b64encode(drawing.svg.read_bytes()).decode("ascii")
    return {"source": f"data:image/svg+xml;base64,{data}", "text": drawing.text}


def _examples(suite: str, cells: Sequence[Cell]) -> list[Context]:
    """The first sample that flashmem fixes, the first that it breaks, and the first that stays wrong."""
    subject = next((cell for cell in cells if cell.suite == suite and cell.method == FLASHMEM and cell.is_main), None)
    base = partner(subject, VANILLA, cells) if subject else None
    if subject is None or base is None:
        return []
    kinds: dict[str, str] = {}
    for name, row in subject.by_sample.items():
        other = base.by_sample.get(name)
        if other is None or row.get("score") is None or other.get("score") is None:
            continue
        kind = _change(row["score"], other["score"])
        if kind:
            kinds.setdefault(kind, name)
    return [
        _example(kind, kinds[kind], subject, base) for kind in ("fixed", "broken", "wrong in both") if kind in kinds
    ]


def _change(score: float, before: float) -> str | None:
    if score != before:
        return "fixed" if score > before else "broken"
    return "wrong in both" if score == 0 else None


def _example(kind: str, name: str, subject: Cell, base: Cell) -> Context:
    text, plain = subject.texts[name], base.texts.get(name, {})
    return {
        "kind": kind,
        "sample": name,
        "prompt": _short(text.get("prompt")),
        "answer": _short(text.get("answer")),
        "vanilla": _short(plain.get("text")),
        "pieces": _pieces(text),
    }


def _pieces(text: Context) -> list[Context]:
    """The generated text in pieces, each with the number of memories injected before it."""
    tokens = text.get("tokens") or []
    places = [trigger["text_index"] for trigger in text.get("triggers") or []]
    if not places or not tokens:
        return [{"memories": 0, "text": _short(text.get("text"))}]
    cuts = sorted({0, *(place for place in places if place <= len(tokens)), len(tokens)})
    return [
        {"memories": places.count(start), "text": _short("".join(tokens[start:end]))}
        for start, end in zip(cuts, [*cuts[1:], len(tokens)], strict=True)
        if end > start or start in places
    ]


def _short(text: Any) -> str:
    shown = "" if text is None else str(text)
    return shown if len(shown) <= _SHOWN_LETTERS else shown[:_SHOWN_LETTERS] + " [...]"


def _provenance(cell: Cell) -> Context:
    attempts = cell.manifest.get("attempts") or [{}]
    # Where the times come from is what the reader has to know.
    timed = next((entry for entry in attempts if entry.get("attempt") == cell.timed_attempt), attempts[-1])
    info = ", ".join(
        f"{key} {value}"
        for key, value in timed.items()
        if isinstance(value, str | int | float) and key not in ("attempt", "started_at", "finished_at")
    )
    return {
        "id": cell.cell_id,
        "suite": cell.suite,
        "method": cell.method,
        "rows": len(cell.rows),
        "attempts": len(attempts),
        "last": attempts[-1].get("started_at", say.DASH),
        "info": info or say.DASH,
    }
