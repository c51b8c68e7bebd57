"""Time at fixed contexts, as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flashmem_bench import stats
from flashmem_bench.published import published_cost
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import FLASHMEM, VANILLA
from flashmem_bench.report.style import CPU_STAMP

if TYPE_CHECKING:
    import pandas as pd

Context = dict[str, Any]


def latency_view(latency: pd.DataFrame) -> list[Context]:
    """Every method over vanilla at fixed contexts, and the rivals over flashmem, run by run.

    Where the backbone has the shape of the paper's, its ratio and its milliseconds a text token stand beside ours.
    """
    rows = []
    # One prompt is answered in each run, however many answers a method draws for it.
    keys = ["protocol", "model", "device", "dtype", "exec", "context"]
    for (protocol, model, device, dtype, _, context), part in latency.groupby(keys, sort=True, dropna=False):
        times = dict(tuple(part.groupby("method", sort=False)))
        named = {
            "protocol": protocol,
            "conditions": f"{model}, {device}, {dtype}",
            "stamp": CPU_STAMP if device == "cpu" else "",
            "context": say.whole(context),
        }
        paper = published_cost(str(model))
        for a, b in _latency_pairs(list(times)):
            n = min(len(times[a]), len(times[b]))
            ratios = [
                stats.geometric_mean_ratio(times[a][column][:n], times[b][column][:n])
                for column in ("e2e_ms", "decode_ms")
            ]
            shown = {"methods": f"{a} / {b}", "runs": n, "ratios": [say.interval(*ratio) for ratio in ratios]}
            ms = [[_token_ms(times[name], column) for column in ("e2e_ms", "decode_ms")] for name in (a, b)]
            rows.append({**named, **shown, "ms": ms, **_published(paper, int(context), a, b)})
    return rows


def _token_ms(rows: pd.DataFrame, column: str) -> str:
    return say.number((rows[column] / rows["output_tokens"]).median())


def _published(paper: Mapping[tuple[int, str], Mapping[str, float]], context: int, a: str, b: str) -> Context:
    """The paper's ratio and milliseconds a token: the reciprocals of its throughput."""
    speeds = [paper.get((context, name), {}).get("text_tok_s") for name in (a, b)]
    if not all(speeds):
        return {"published": None}
    mine, other = (1e3 / speed for speed in speeds if speed)
    return {"published": {"ratio": say.number(mine / other), "ms": [say.number(mine), say.number(other)]}}


def _latency_pairs(methods: Sequence[str]) -> list[tuple[str, str]]:
    plain = [(name, VANILLA) for name in methods if name != VANILLA and VANILLA in methods]
    return plain + [(name, FLASHMEM) for name in methods if name not in (FLASHMEM, VANILLA) and FLASHMEM in methods]
