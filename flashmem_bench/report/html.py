"""One plain page that holds the whole report: tables, figures, findings, definitions.

The page loads nothing: figures are embedded, the style sheet is inline, there is no script. Every text that a model
or a data set wrote goes through Jinja's escaping. The findings are made from the ``comparisons`` table by a fixed
rule, gains and losses alike.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flashmem_bench import __version__, stats
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import FLASHMEM, VANILLA, Cell, partner, settings_differences
from flashmem_bench.report.figures import ABLATION_SHEET
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
    environment = Environment(
        loader=PackageLoader("flashmem_bench.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
        "tests": _tests(tables["comparisons"]),
        "claims": _claims(tables["claims"]),
        "findings": [finding for suite in suites for finding in findings(suite, tables["comparisons"], _labels(cells))],
        "warnings": list(warnings),
        "suites": [_suite(suite, cells, tables, drawings) for suite in suites],
        "stories": {suite: _stories(suite, stories) for suite in suites},
        "latency": _latency(tables["latency"]),
        "latency_figures": [_figure(drawing) for drawing in drawings if drawing.kind == "latency"],
        "training": [_figure(drawing) for drawing in drawings if drawing.kind == "training"],
        "ablations": _ablations(tables["ablations"], drawings),
        "definitions": [column for column in TABLES["runs"] if column.name in _DEFINED],
    }
    return environment.get_template("report.html.j2").render(context)


def _tests(comparisons: pd.DataFrame) -> dict[str, int]:
    """How many comparisons were tested in each family."""
    tested = comparisons[comparisons["p_value"].notna()]
    return {name: int((tested["family"] == name).sum()) for name in ("primary", "other")}


def _claims(claims: pd.DataFrame) -> list[Context]:
    """Each claim with its answers; those that nothing has been run for come together at the end."""
    found = []
    for name, rows in claims.groupby("id", sort=False):
        records = rows.to_dict("records")
        shown = [_claim_row(row) for row in records if say.known(row["estimate"])]
        missing = list(dict.fromkeys(str(row["why"]) for row in records if not say.known(row["estimate"])))
        first = {key: records[0][key] for key in ("claim", "source", "margin", "margin_fixed_at")}
        found.append({"id": name, **first, "rows": shown, "missing": "; ".join(missing)})
    return sorted(found, key=lambda claim: not claim["rows"])


def _claim_row(row: Context) -> Context:
    where = row["suite"] if say.known(row["suite"]) else f"{row['model']}, {row['device']}"
    if row["test"] in ("faster", "falls"):
        estimate = say.interval(row["estimate"], row["low"], row["high"])
    else:
        estimate = say.points(row["estimate"], row["low"], row["high"])
    units = {"faster": "times", "falls": "nats", "no-harm": "% broken"}
    return {
        "where": where,
        "verdict": row["verdict"],
        "estimate": f"{estimate} {units.get(row['test'], 'points')}",
        "b": row["b"],
        "n": say.whole(row["n"]),
        "seeds": say.whole(row["seeds"]),
        "p": say.p_value(row["p_adjusted"]),
        "why": row["why"],
    }


def findings(suite: str, comparisons: pd.DataFrame, labels: Mapping[str, str]) -> list[Context]:
    """Where flashmem stands on a suite, against vanilla and against its placebos, in sentences.

    Args:
        suite: name of the suite.
        comparisons: the table of that name.
        labels: how to name the flashmem cells, by id.

    Returns:
        One mapping a sentence with ``suite``, ``tone`` (good, bad or open) and ``text``.
    """
    here = comparisons[(comparisons["suite"] == suite) & (comparisons["a"] == FLASHMEM)]
    found = []
    for row in here[here["kind"] == "baseline"].to_dict("records"):
        found.append({"suite": suite, **_against_vanilla(row, labels[row["cell_a"]])})
    for (cell, verdict), rows in here[here["kind"] == "placebo"].groupby(["cell_a", "verdict"], sort=False):
        found.append({"suite": suite, **_against_placebos(str(verdict), labels[cell], rows.to_dict("records"))})
    return found


def _labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Method names by cell id, with whatever tells apart several headline cells of one suite and method."""
    differences = settings_differences(cells)
    labels = {}
    for cell in cells:
        peers = [other for other in cells if other.is_main and (other.suite, other.method) == (cell.suite, cell.method)]
        odd = [cell.condition_text] if len({peer.condition for peer in peers}) > 1 else []
        odd += [differences[cell.cell_id]] if differences[cell.cell_id] else []
        labels[cell.cell_id] = f"{cell.method} ({'; '.join(odd)})" if odd else cell.method
    return labels


def _against_vanilla(row: Context, name: str) -> Context:
    gain = f"{say.points(row['difference'], row['low'], row['high'])} points on {row['n']} samples"
    cost = (
        f"It takes {say.times(row['time_ratio'])} the time of vanilla with the prefill "
        f"and {say.times(row['decode_time_ratio'])} without."
    )
    if not say.known(row["difference"]):
        return {"tone": "open", "text": f"No valid score of {name} and vanilla to compare. {cost}"}
    changed = f"{say.whole(row['fixed'])} samples fixed, {say.whole(row['broken'])} broken"
    if row["verdict"] == "better":
        return {"tone": "good", "text": f"{name} beats vanilla: {gain}; {changed}. {cost}"}
    if row["verdict"] == "worse":
        return {"tone": "bad", "text": f"{name} loses to vanilla: {gain}; {changed}. {cost}"}
    return {"tone": "open", "text": f"Cannot tell {name} from vanilla: {gain}; {changed}. {cost}"}


def _against_placebos(verdict: str, name: str, rows: list[Context]) -> Context:
    names = "; ".join(f"{row['b']} {say.points(row['difference'], row['low'], row['high'])}" for row in rows)
    plural = "placebo" if len(rows) == 1 else "placebos"
    if verdict == "better":
        return {"tone": "good", "text": f"{name} beats its {plural}, in points: {names}."}
    if verdict == "worse":
        return {"tone": "bad", "text": f"{name} loses to its {plural}, in points: {names}."}
    moments = any(row["b"].endswith("trigger") for row in rows)
    contents = any(not row["b"].endswith("trigger") for row in rows)
    meant = " or ".join(["the moment"] * moments + ["the content of the memory"] * contents)
    return {
        "tone": "open",
        "text": f"Cannot tell {name} from its {plural}, in points: {names}. No evidence here that {meant} matters.",
    }


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
        "rows": [_run_row(row, verdicts.get(row["cell"], "")) for row in rows],
    }


def _run_row(row: Context, verdict: str) -> Context:
    return {
        "method": row["method"],
        "settings": row["settings"] if say.known(row["settings"]) else "",
        "n": say.whole(row["n"]),
        "score": say.percent_interval(row["score"], row["score_low"], row["score_high"]),
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


def _latency(latency: pd.DataFrame) -> list[Context]:
    """Every method over vanilla at fixed contexts, and the rivals over flashmem, run by run."""
    rows = []
    keys = ["protocol", "model", "device", "dtype", "batch_size", "exec", "context"]
    for (protocol, model, device, dtype, _, _, context), part in latency.groupby(keys, sort=True, dropna=False):
        times = dict(tuple(part.groupby("method", sort=False)))
        named = {
            "protocol": protocol,
            "conditions": f"{model}, {device}, {dtype}",
            "stamp": CPU_STAMP if device == "cpu" else "",
            "context": say.whole(context),
        }
        for a, b in _latency_pairs(list(times)):
            n = min(len(times[a]), len(times[b]))
            ratios = [
                stats.geometric_mean_ratio(times[a][column][:n], times[b][column][:n])
                for column in ("e2e_ms", "decode_ms")
            ]
            shown = {"methods": f"{a} / {b}", "runs": n, "ratios": [say.interval(*ratio) for ratio in ratios]}
            rows.append({**named, **shown, "ms": [say.number(times[method]["e2e_ms"].median()) for method in (a, b)]})
    return rows


def _latency_pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    plain = [(name, VANILLA) for name in methods if name != VANILLA and VANILLA in methods]
    return plain + [(name, FLASHMEM) for name in methods if name not in (FLASHMEM, VANILLA) and FLASHMEM in methods]


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
    info = ", ".join(
        f"{key} {value}"
        for key, value in attempts[-1].items()
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
