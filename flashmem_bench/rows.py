"""From one generation to one sample row and one text record.

This is where quality and cost meet: the grade, the counts, the phase times and the trigger's moments of a sample
become one flat dictionary with the columns of `schema.SAMPLE_COLUMNS`. Nothing is generated, graded or written here.

Invariant: every value is an int, float, str, bool or None.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flashmem_bench.schema import METRIC_PREFIX, blank_sample

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.generation import Generation
    from flashmem_bench.clock import Timing
    from flashmem_bench.tasks import Grade, Sample


@dataclass(frozen=True)
class Prompt:
    """A prompt as it goes into the backbone.

    Attributes:
        ids: Token ids, template included, after truncation.
        truncated: It was cut by `--truncate`.
        beyond: It is longer than the trained context.
    """

    ids: list[int]
    truncated: bool
    beyond: bool

    @property
    def sha(self) -> str:
        """Hash of the ids: equal hashes prove equal prompts."""
        return hashlib.sha256(array("q", self.ids)).hexdigest()[:16]


def make_prompt(backbone: Backbone, text: str, truncate: str | None, budget: int) -> Prompt:
    """Encode a prompt, cut it where the user asked for that, and say what was done.

    Args:
        backbone: Gives tokenizer, template and limits.
        text: The complete user message.
        truncate: `left` drops the beginning, `middle` the middle; None cuts nothing.
        budget: New tokens that must fit behind the prompt.
    """
    return fit_prompt(backbone, backbone.encode_chat(text), truncate, budget)


def fit_prompt(backbone: Backbone, ids: list[int], truncate: str | None, budget: int) -> Prompt:
    """Return a prompt that is encoded already, cut as `make_prompt` says."""
    room = max(1, backbone.max_positions - budget)
    cut = truncate is not None and len(ids) > room
    if cut and truncate == "left":
        ids = ids[-room:]
    elif cut:
        head = room // 2
        ids = ids[:head] + ids[len(ids) - (room - head) :]
    return Prompt(ids, cut, len(ids) > backbone.trained_context)


def trigger_hits(prefixes: Sequence[str], text: str, moments: Sequence[str]) -> tuple[float | None, float | None]:
    """Return precision and recall of the triggers against the moments that the suite marks as right.

    Args:
        prefixes: The text emitted before each trigger.
        text: The whole text.
        moments: Texts that stand right before a right moment, each at the start of a line.

    Returns:
        Triggers at moments / triggers, and moments fired at / moments that the text reached; each None where its
        denominator is 0.
    """
    reached = {moment for moment in moments if f"\n{moment.strip()}" in f"\n{text}"}
    lines = [prefix.rstrip(" ").rpartition("\n")[2].strip() for prefix in prefixes]
    wanted = {moment.strip() for moment in reached}
    hits = [line for line in lines if line in wanted]
    precision = len(hits) / len(lines) if lines else None
    recall = len(set(hits)) / len(wanted) if wanted else None
    return precision, recall


def generation_columns(generation: Generation, sample: Sample, backbone: Backbone) -> dict[str, Any]:
    """Return the counts of a generation and what its trigger did."""
    triggers = len(generation.triggers)
    steps = len(generation.entropies)
    columns: dict[str, Any] = {
        "prompt_tokens": generation.prompt_tokens,
        "output_tokens": generation.output_tokens,
        "latent_tokens": generation.latent_tokens,
        "positions_encoded": generation.positions_encoded,
        "positions_reused": generation.positions_reused,
        "positions_woven": generation.positions_woven,
        "positions_evicted": generation.positions_evicted,
        "drawn_tokens": generation.drawn_tokens,
        "triggers": triggers,
        "trigger_rate": triggers / (1 + generation.output_tokens),
        # Before the first memory the text was plain, so this is how far the method leaves the plain backbone.
        "first_kl_nats": generation.triggers[0].divergence if triggers else None,
        "finish_reason": generation.finish_reason,
        "truncated": generation.finish_reason == "length",
    }
    if generation.above_threshold is not None and steps:
        columns["above_tau_rate"] = generation.above_threshold / steps
    if sample.moments:
        prefixes = [backbone.decode(generation.token_ids[: t.text_index]) for t in generation.triggers]
        precision, recall = trigger_hits(prefixes, generation.text, sample.moments)
        columns["trigger_precision"], columns["trigger_recall"] = precision, recall
    return columns


def timing_columns(timing: Timing, execution: str = "eager") -> dict[str, Any]:
    """Return the time columns; inside a pass that is replayed nobody can time the monitor."""
    names = ("prefill_ms", "ttft_ms", "decode_ms", "e2e_ms", "tpot_ms", "sample_ms", "monitor_ms", "consolidate_ms",
             "inject_ms", "overhead_share")  # fmt: skip
    columns = {name: getattr(timing, name) for name in names}
    return columns if execution == "eager" else {**columns, "monitor_ms": None, "overhead_share": None}


def grade_columns(grade: Grade, *, scored: bool, valid: bool) -> dict[str, Any]:
    """Return the grade's columns; `scored` False (untrained memory) leaves every score null, as a late grade does."""
    scored = scored and grade.counts
    columns: dict[str, Any] = {
        "parse_status": grade.parse_status,
        "answer_extracted": grade.extracted,
        "score_valid": scored and valid,
        "score": float(grade.score) if scored else None,
    }
    return columns | metric_columns(grade.metrics) if scored else columns


def metric_columns(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return further metrics of a sample as columns."""
    return {f"{METRIC_PREFIX}{name}": float(value) for name, value in metrics.items()}


def sample_row(common: Mapping[str, Any], *parts: Mapping[str, Any]) -> dict[str, Any]:
    """Join the columns of a cell and of a sample into one row with every column present.

    One process answers and its times count, unless a part says otherwise.
    """
    row = blank_sample()
    row.update(timing_valid=True, workers=1)
    row.update(common)
    for part in parts:
        row.update(part)
    return row


def text_record(sample: Sample, generation: Generation | None, backbone: Backbone | None) -> dict[str, Any]:
    """Return what the text file keeps of a sample, enough to grade it again and to draw its entropy trace."""
    record: dict[str, Any] = {
        "sample_id": sample.sample_id,
        "prompt": sample.prompt,
        "text": "",
        "target": sample.target,
        "answer": sample.answer,
        "tokens": [],
        "triggers": [],
        "entropies": [],
        "output_entropies": [],
    }
    if generation is None or backbone is None:
        return record
    record["text"] = generation.text
    if generation.candidates:
        record["candidates"] = generation.candidates
    record["tokens"] = [_piece(backbone.tokenizer, token) for token in generation.token_ids]
    record["triggers"] = [
        {
            "text_index": t.text_index,
            "entropy": t.entropy,
            "output_entropy": t.output_entropy,
            "latents": t.latents,
            "divergence": t.divergence,
        }
        for t in generation.triggers
    ]
    record["entropies"] = [round(value, 6) for value in generation.entropies]
    record["output_entropies"] = [round(value, 6) for value in generation.output_entropies]
    return record


@lru_cache(maxsize=65536)
def _piece(tokenizer: Any, token: int) -> str:
    """Return the text of one token."""
    return str(tokenizer.decode([token]))
