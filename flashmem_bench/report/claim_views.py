"""The verdicts of the page: the claims with their answers, and what was found of flashmem on each suite.

Findings are made from the ``comparisons`` table by a fixed rule, gains and losses alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import FLASHMEM, Cell, settings_differences

if TYPE_CHECKING:
    import pandas as pd

Context = dict[str, Any]


def tests_made(comparisons: pd.DataFrame) -> dict[str, int]:
    """How many comparisons were tested in each family."""
    tested = comparisons[comparisons["p_value"].notna()]
    return {name: int((tested["family"] == name).sum()) for name in ("primary", "other")}


def claims_view(claims: pd.DataFrame) -> list[Context]:
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


def labels_of(cells: Sequence[Cell]) -> dict[str, str]:
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
