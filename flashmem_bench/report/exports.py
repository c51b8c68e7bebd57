"""The tables that go into a paper or an issue, as Markdown and as LaTeX: scores, comparisons, claims.

The csv and parquet files hold every column; these hold what one prints, worded as on the page.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flashmem_bench.report import wording as say
from flashmem_bench.terminal import clean

_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
          "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
          "<": r"\textless{}", ">": r"\textgreater{}"}  # fmt: skip

Lines = list[list[str]]

_FORMULA = re.compile(r"\s*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?%?", re.IGNORECASE)


def write_exports(tables: dict[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write `scores`, `comparisons` and `claims` in both forms; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "scores": _scores(tables["runs"]),
        "comparisons": _comparisons(tables["comparisons"]),
        "claims": _claims(tables["claims"]),
    }
    paths = []
    for name, (head, lines) in made.items():
        for suffix, text in (("md", markdown(head, lines)), ("tex", latex(head, lines))):
            path = folder / f"{name}.{suffix}"
            path.write_text(text, encoding="utf-8")
            paths.append(path)
    return paths


def markdown(head: Sequence[str], lines: Lines) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(_marked(cell) for cell in row) + " |\n" for row in rows)


def _marked(text: str) -> str:
    """A cell on one line, in which nothing is a tag, a border or a link."""
    plain = re.sub(r"&(?=[#\w]+;)", "&amp;", clean(" ".join(text.split())))
    plain = re.sub(r"<(?=[\w/!?])", "&lt;", plain)
    return re.sub(r"([\\|`]|(?<=\])\()", r"\\\1", plain)


def guarded(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts no spreadsheet takes for a formula: what begins like one gets an apostrophe before it.

    Numbers written as text stay, signs and all. The parquet file beside has every text as it is.
    """
    texts = [name for name in table.columns if not pd.api.types.is_numeric_dtype(table[name])]
    changed = {name: table[name].map(_guarded, na_action="ignore") for name in texts}
    return table.assign(**changed) if changed else table


def _guarded(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value


def latex(head: Sequence[str], lines: Lines) -> str:
    """A LaTeX tabular in the style of booktabs."""
    body = [" & ".join(_escaped(cell) for cell in row) + r" \\" for row in lines]
    top = " & ".join(_escaped(cell) for cell in head) + r" \\"
    start = r"\begin{tabular}{" + "l" * len(head) + "}"
    return "\n".join([start, r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in clean(" ".join(text.split())))


def _scores(runs: pd.DataFrame) -> tuple[list[str], Lines]:
    head = ["suite", "method", "settings", "n", "score % [95 %]", "against vanilla", "time", "time without prefill",
            "device"]  # fmt: skip
    lines = [
        [
            row["suite"],
            row["method"],
            _text(row["settings"]),
            say.whole(row["n"]),
            say.percent_interval(row["score"], row["score_low"], row["score_high"]),
            say.points(row["delta_vanilla"], row["delta_low"], row["delta_high"]),
            say.times(row["time_ratio"]),
            say.times(row["decode_time_ratio"]),
            row["device"],
        ]
        for row in runs[runs["role"] == "main"].to_dict("records")
    ]
    return head, lines


def _comparisons(comparisons: pd.DataFrame) -> tuple[list[str], Lines]:
    head = ["suite", "a", "b", "n", "points [95 %]", "fixed / broken", "p", "p adjusted", "family", "verdict"]
    lines = [
        [
            row["suite"],
            row["a"],
            row["b"],
            say.whole(row["n"]),
            say.points(row["difference"], row["low"], row["high"]),
            f"{say.whole(row['fixed'])} / {say.whole(row['broken'])}",
            say.p_value(row["p_value"]),
            say.p_value(row["p_adjusted"]),
            _text(row["family"]),
            row["verdict"],
        ]
        for row in comparisons.to_dict("records")
    ]
    return head, lines


def _claims(claims: pd.DataFrame) -> tuple[list[str], Lines]:
    head = ["claim", "where", "verdict", "estimate [95 %]", "n", "why"]
    lines = [
        [
            row["claim"],
            _text(row["suite"]) or _text(row["model"]),
            row["verdict"],
            say.interval(row["estimate"], row["low"], row["high"]),
            say.whole(row["n"]),
            _text(row["why"]),
        ]
        for row in claims.to_dict("records")
    ]
    return head, lines


def _text(value: Any) -> str:
    return str(value) if say.known(value) else ""
