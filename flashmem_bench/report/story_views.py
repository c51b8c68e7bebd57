"""One memory as a reader sees it: the history it looked at, its latents one by one, and what it changed.

Plain values for the template. Weights of a history that was too long to be kept whole are those of the heaviest
positions of each latent; the rest is shown as a share of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flashmem_bench.report import wording as say
from flashmem_bench.report.story_charts import heat_map, shown, watched_entropy

Context = dict[str, Any]
Row = dict[int, float]

MOST_TABS = 16
_TOP_POSITIONS = 8
_BARS = 12
# Histories up to so many positions are shown whole; of longer ones what is looked at, with its surroundings.
_WHOLE_HISTORY, _CONTEXT, _MOST_SHOWN = 500, 10, 120
_LOOKED_AT = 0.01


def probability(value: float) -> str:
    """A probability as a percentage that never reads as an impossible or a certain one."""
    if 0 < value < 0.001:
        return "< 0.1 %"
    if 0.999 < value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %" if not 0.0995 <= value < 0.9 else f"{100 * value:.0f} %"


def memory_view(trace: Context, number: int) -> Context:
    """What the template shows of one injection."""
    injection = trace["injections"][number]
    history = history_of(trace, number)
    blocks = [_block(attention, history, trace["sinks"]) for attention in injection["attention"]]
    index = injection["text_index"]
    return {
        "number": number + 1,
        "where": "at prompt end" if index == 0 else f"after {index} text token{'s' if index > 1 else ''}",
        "token": trace["answer"][index] if index < len(trace["answer"]) else "",
        "step": trace["steps"][index],
        "position": injection["position"],
        "latents": injection["latents"],
        "note": injection["attention_note"],
        "blocks": blocks,
        "rows": _latents(injection, history, trace["sinks"]),
        "spoken": bool(injection["spoken"]),
        "change": _change(injection["next_token"]),
    }


def history_of(trace: Context, number: int) -> list[Context]:
    """The positions that a memory could look at, in order: prompt, answer tokens, earlier latents."""
    injection = trace["injections"][number]
    history = [{"kind": "prompt", "text": piece} for piece in trace["prompt"]]
    written = 0
    for order, earlier in enumerate(trace["injections"][: number + 1], start=1):
        pieces = trace["answer"][written : earlier["text_index"]]
        history += [{"kind": "answer", "text": piece} for piece in pieces]
        written = earlier["text_index"]
        if order <= number:
            names = [f"m{order}.{latent}" for latent in range(1, earlier["latents"] + 1)]
            history += [{"kind": "latent", "text": name} for name in names]
    assert len(history) == injection["position"]
    return history


def _rows(attention: Context) -> list[Row]:
    """For each latent its weight by position."""
    places = attention["positions"] or [range(len(row)) for row in attention["weights"]]
    return [dict(zip(where, row, strict=True)) for where, row in zip(places, attention["weights"], strict=True)]


def _mean(rows: Sequence[Row]) -> Row:
    mean: Row = {}
    for row in rows:
        for place, weight in row.items():
            mean[place] = mean.get(place, 0.0) + weight / len(rows)
    return mean


def _heaviest(row: Row, count: int, skip: int = 0) -> list[tuple[int, float]]:
    kept = [(place, weight) for place, weight in row.items() if place >= skip]
    return sorted(kept, key=lambda entry: (-entry[1], entry[0]))[:count]


def _block(attention: Context, history: Sequence[Context], sinks: int) -> Context:
    """One consolidator block: its heat map and the history shaded by it."""
    rows = _rows(attention)
    names = [shown(entry["text"]) for entry in history]
    return {
        "layer": attention["layer"],
        "map": heat_map(rows, [entry["kind"] for entry in history], names, sinks),
        "history": _shaded(rows, history, sinks),
        "tabs": min(MOST_TABS, len(rows)),
    }


def _shaded(rows: Sequence[Row], history: Sequence[Context], sinks: int) -> list[Context]:
    """The history with a shade for the mean and for each latent; unread stretches of a long one become gaps."""
    mean = _mean(rows)
    scales = [max((w for place, w in row.items() if place >= sinks), default=0.0) or 1.0 for row in (mean, *rows)]
    shown_places = _places_shown(rows, len(history))
    pieces: list[Context] = []
    previous = -1
    for place in shown_places:
        if place > previous + 1:
            pieces.append({"kind": "gap", "text": f" [{place - previous - 1} tokens] ", "shades": "", "hover": ""})
        pieces.append(_shaded_piece(place, history[place], mean, rows, scales))
        previous = place
    if previous < len(history) - 1:
        pieces.append({"kind": "gap", "text": f" [{len(history) - 1 - previous} tokens]", "shades": "", "hover": ""})
    return pieces


def _shaded_piece(place: int, entry: Context, mean: Row, rows: Sequence[Row], scales: Sequence[float]) -> Context:
    names = ["--m", *(f"--l{number}" for number in range(1, 1 + min(MOST_TABS, len(rows))))]
    shades = []
    for name, row, scale in zip(names, (mean, *rows), scales, strict=False):
        shade = min(1.0, row.get(place, 0.0) / scale) ** 0.5
        if shade >= 0.05:
            shades.append(f"{name}:{shade:.2f}")
    keenest = max(range(len(rows)), key=lambda number: rows[number].get(place, 0.0))
    hover = f"position {place}: {100 * mean.get(place, 0.0):.1f} % of the memory's attention"
    if rows[keenest].get(place, 0.0) >= _LOOKED_AT:
        hover += f", most by latent {keenest + 1} ({100 * rows[keenest][place]:.0f} %)"
    # A shade on white space alone would not be seen.
    text = entry["text"].replace("\n", "\u21b5\n") if shades else entry["text"]
    return {"kind": entry["kind"], "text": text, "shades": ";".join(shades), "hover": hover}


def _places_shown(rows: Sequence[Row], total: int) -> list[int]:
    if total <= _WHOLE_HISTORY:
        return list(range(total))
    best: Row = {}
    for row in rows:
        for place, weight in row.items():
            best[place] = max(best.get(place, 0.0), weight)
    kept: set[int] = set()
    for place, weight in _heaviest(best, _MOST_SHOWN):
        if weight >= _LOOKED_AT:
            kept.update(range(max(0, place - _CONTEXT), min(total, place + _CONTEXT + 1)))
    return sorted(kept)


def _latents(injection: Context, history: Sequence[Context], sinks: int) -> list[Context]:
    """One row a latent. With several blocks the attention is the last one's."""
    attention = injection["attention"][-1] if injection["attention"] else None
    rows = _rows(attention) if attention else [{}] * injection["latents"]
    spoken = injection["spoken"] or [[]] * injection["latents"]
    views = []
    for number, (row, near, said) in enumerate(zip(rows, injection["nearest"], spoken, strict=True)):
        views.append(
            {
                "number": number + 1,
                "mass": _mass(row, attention, number, history, sinks) if attention else [],
                "top": [
                    {
                        "text": history[place]["text"],
                        "kind": history[place]["kind"],
                        "place": place,
                        "share": f"{100 * weight:.0f} %",
                        "shade": f"{min(1.0, weight) ** 0.5:.2f}",
                    }
                    for place, weight in _heaviest(row, _TOP_POSITIONS)
                    if weight >= 0.005
                ],
                "near": [{"text": entry["text"], "value": f"{entry['value']:.2f}"} for entry in near],
                "said": [{"text": entry["text"], "value": probability(entry["value"])} for entry in said],
            }
        )
    return views


def _mass(row: Row, attention: Context, number: int, history: Sequence[Context], sinks: int) -> list[Context]:
    """Where a latent's attention lies, as shares that add up to one."""
    shares = dict.fromkeys(("sinks", "prompt", "answer", "latent"), 0.0)
    for place, weight in row.items():
        shares["sinks" if place < sinks else history[place]["kind"]] += weight
    shares["latent"] += attention["own"][number]
    shares["not kept"] = attention["rest"][number]
    return [
        {"kind": kind.replace(" ", "-"), "text": f"{kind} {100 * share:.0f} %", "width": f"{100 * share:.1f}"}
        for kind, share in shares.items()
        if share >= 0.0005
    ]


def _change(shift: Context | None) -> Context | None:
    """The next-token distribution on either side: the tokens that matter most in either, as pairs of bars."""
    if shift is None:
        return None
    tokens = {entry["token"]: entry for entry in (*shift["tokens"], shift["proposed"], shift["sampled"])}
    ordered = sorted(tokens.values(), key=lambda entry: (-max(entry["before"], entry["after"]), entry["token"]))
    kept = ordered[:_BARS]
    kept += [entry for entry in ordered[_BARS:] if entry["token"] in _chosen(shift)]
    longest = max(ordered[0]["before"], ordered[0]["after"])
    return {
        "kl": say.number(shift["kl"]),
        "same": shift["proposed"]["token"] == shift["sampled"]["token"],
        "proposed": shift["proposed"],
        "sampled": shift["sampled"],
        "longest": probability(longest),
        "bars": [
            {
                "text": entry["text"],
                "before": f"{100 * entry['before'] / longest:.2f}",
                "after": f"{100 * entry['after'] / longest:.2f}",
                "before_text": probability(entry["before"]),
                "after_text": probability(entry["after"]),
                "mark": _mark(entry["token"], shift),
                "hover": f"rank {entry['rank_before']} before, {entry['rank_after']} after",
            }
            for entry in kept
        ],
    }


def _chosen(shift: Context) -> set[int]:
    return {shift["proposed"]["token"], shift["sampled"]["token"]}


def _mark(token: int, shift: Context) -> str:
    proposed, sampled = (token == shift[name]["token"] for name in ("proposed", "sampled"))
    if proposed and sampled:
        return "chosen, with or without"
    return "chosen" if sampled else "would have been chosen" if proposed else ""


def summary_parts(trace: Context, number: int) -> list[tuple[str, str]]:
    """One memory in a sentence, as (kind, text) parts; kind is text or token."""
    injection = trace["injections"][number]
    step = trace["steps"][injection["text_index"]]
    parts = [("text", "At prompt end" if injection["text_index"] == 0 else "Inside the answer")]
    watched = watched_entropy(trace)
    name = "output" if watched == "output_entropy" else "attention"
    above = f" > tau {say.number(trace['tau'], 4)}" if trace["tau"] is not None else ""
    parts.append(("text", f" ({name} entropy {say.number(step[watched], 4)}{above} nats)"))
    if injection["attention"]:
        history = history_of(trace, number)
        mean = _mean(_rows(injection["attention"][-1]))
        parts.append(("text", " it looked most at "))
        parts += _listed([history[place]["text"] for place, _ in _heaviest(mean, 4, trace["sinks"])])
    parts.append(("text", "; its latents lie nearest to "))
    parts += _listed([text for text, _ in Counter(row[0]["text"] for row in injection["nearest"]).most_common(3)])
    closest = max(row[0]["value"] for row in injection["nearest"])
    parts.append(("text", f" (cosine up to {closest:.2f})"))
    return [*parts, *_changed_parts(injection["next_token"])]


def _listed(texts: Sequence[str]) -> list[tuple[str, str]]:
    parts: list[tuple[str, str]] = []
    for order, text in enumerate(texts):
        parts += [("text", " ")] if order else []
        parts.append(("token", text))
    return parts


def _changed_parts(shift: Context | None) -> list[tuple[str, str]]:
    if shift is None:
        return [("text", ".")]
    old, new = shift["proposed"], shift["sampled"]
    end = f", KL {say.number(shift['kl'])} nats."
    if old["token"] == new["token"]:
        moved = f" ({probability(old['before'])} before, {probability(old['after'])} after)"
        return [("text", "; the next token stayed "), ("token", old["text"]), ("text", moved + end)]
    return [
        ("text", "; the next token went from "),
        ("token", old["text"]),
        ("text", f" ({probability(old['before'])} before) to "),
        ("token", new["text"]),
        ("text", f" ({probability(new['before'])} before, {probability(new['after'])} after){end}"),
    ]
