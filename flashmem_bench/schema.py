"""The result tables: every column with its type, unit, formula and meaning.

This page is the single source of truth for what a number in the results means. The runner fills the sample
columns, ``report/tables.py`` derives all other tables from them, and the report prints the formulas from
here, so that a reader can trace a published number back in two hops.

It does not compute anything and does not read or write files. It imports neither torch, pandas nor pyarrow at
module
level: ``arrow_schema`` imports pyarrow when a table is written.

Invariants: column names are unique within a table; a unit is part of the name where there is one (``_ms``,
``_bytes``); a column that cannot be known is null, never 0. A change of a name, type or formula raises
``SCHEMA_VERSION``; a results folder of an earlier version is migrated or refused (see ``migrations``), one of a later
version refused. The ids of cells hold ``ANSWER_VERSION`` instead, which is raised only when the same settings can give
other answers: a new column makes no finished answer worthless.

One convention joins the sample rows and the ``metrics`` table: a sample row may carry further keys that begin
with ``metric.`` (``metric.rouge1``), and each becomes one row of ``metrics``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 3
ANSWER_VERSION = 2

METRIC_PREFIX = "metric."

DType = Literal["string", "int", "float", "bool"]


@dataclass(frozen=True)
class Column:
    """One column of a result table.

    Attributes:
        name: column name, with its unit as a suffix where it has one.
        dtype: logical type; every column may hold nulls.
        unit: "ms", "bytes", "tokens", "share" (0 to 1), "nats", or "" for none.
        formula: how the value is computed from other columns, "" for a directly observed value.
        description: one sentence.
    """

    name: str
    dtype: DType
    unit: str = ""
    formula: str = ""
    description: str = ""


def _c(name: str, dtype: DType, description: str, unit: str = "", formula: str = "") -> Column:
    return Column(name, dtype, unit, formula, description)


_CELL = _c("cell", "string", "Id of the cell: hash of everything that can change an answer.")
_SUITE = _c("suite", "string", "Name of the suite.")
_METHOD = _c("method", "string", "Name of the method.")
_MODEL = _c("model", "string", "Name or path of the backbone.")
_SEED = _c("seed", "int", "Seed of sampling and order.")
_DEVICE = _c("device", "string", "Device type; on cpu every time is a CPU timing.")
_DTYPE = _c("dtype", "string", "Floating-point type of the backbone.")
_BATCH = _c("batch_size", "int", "Samples under way at once; above 1 times are latencies under that load.")
_EXEC = _c("exec", "string", "Execution mode: eager, compile or graph; never mixed in a comparison.")
_TRAIN_SEED = _c("train_seed", "int", "Seed of the training that made the checkpoint; null without one.")

SAMPLE_COLUMNS: tuple[Column, ...] = (
    _CELL,
    _SUITE,
    _METHOD,
    _MODEL,
    _SEED,
    _TRAIN_SEED,
    _c("sample_id", "string", "Id of the sample, unique within its suite."),
    _c("index", "int", "Position in the suite's fixed order; --limit N takes the indices below N."),
    _c("stratum", "string", "Group for which the suite reports separate scores (steps, links, length, task)."),
    _c("cluster", "string", "What the sample shares with others, such as a document; null where it stands alone."),
    _c("session_id", "string", "Session of the sample: questions about one history; null where it has none."),
    _c("attempt", "int", "Which start of the command made this row; 1 is the first."),
    _c(
        "timing_valid",
        "bool",
        "Whether the times of this row may be used; false after a batch that did not fit into memory was split, and "
        "where other workers ran on the same machine meanwhile.",
    ),
    _c("workers", "int", "How many processes worked on this attempt."),
    _c("worker", "int", "Which of them answered, from 0; null where one process did all."),
    _c("started_at", "string", "UTC time at which the sample began, in a batch took its seat, ISO 8601."),
    _c("prompt_sha", "string", "Hash of the prompt's token ids; equal hashes prove equal prompts."),
    _c("prompt_tokens", "int", "Tokens of the prompt, template included.", "tokens"),
    _c(
        "prefix_tokens",
        "int",
        "Tokens of the prompt that are proved to be its session's history; null without a session or a proof.",
        "tokens",
    ),
    _c(
        "prefix_reused",
        "bool",
        "The prompt went on from a kept history; false where the whole prompt was encoded, as by the first question "
        "of a session; null without one.",
        "",
        "positions_reused > 0",
    ),
    _c("prompt_truncated", "bool", "The prompt was cut by --truncate."),
    _c("output_tokens", "int", "Generated text tokens with EOS, latents never counted.", "tokens"),
    _c("latent_tokens", "int", "Latent positions injected into the cache.", "tokens"),
    _c(
        "positions_encoded",
        "int",
        "Positions that went through the backbone.",
        "tokens",
        "prompt_tokens + output_tokens + latent_tokens - positions_reused, less a last token that needs no encoding; "
        "more where a method encodes them again",
    ),
    _c(
        "positions_reused",
        "int",
        "Positions of the prompt that an earlier question of the session had encoded; 0 where nothing was reused.",
        "tokens",
    ),
    _c(
        "positions_woven",
        "int",
        "Positions that went through a further model: a separate encoder, or MemGen's weaver and trained trigger.",
        "tokens",
    ),
    _c(
        "positions_evicted",
        "int",
        "Positions of the prompt whose keys and values were dropped; 0 where it was within the budget.",
        "tokens",
    ),
    _c("drawn_tokens", "int", "Text tokens of all answers that voted; null without a vote.", "tokens"),
    _c("triggers", "int", "Injections made."),
    _c("trigger_rate", "float", "Injections per decision step.", "share", "triggers / (1 + output_tokens)"),
    _c("threshold", "float", "Threshold of the trigger; null when the policy has none.", "nats"),
    _c(
        "above_tau_rate",
        "float",
        "Decision steps whose entropy exceeds the threshold, cooldown and cap ignored.",
        "share",
        "steps above threshold / decision steps",
    ),
    _c(
        "trigger_precision",
        "float",
        "Triggers that fell on a moment the suite marks as right; null without marks.",
        "share",
        "triggers at marked moments / triggers",
    ),
    _c(
        "trigger_recall",
        "float",
        "Marked moments at which the policy fired; null without marks.",
        "share",
        "triggers at marked moments / marked moments reached",
    ),
    _c(
        "first_kl_nats",
        "float",
        "What the first memory changes at once: divergence of the next-token distribution from the plain one.",
        "nats",
        "sum(p * log(p / q)), p before the memory, q behind it",
    ),
    _c("finish_reason", "string", "eos, stop or length; scored where given answers were judged, nothing generated."),
    _c("truncated", "bool", "The answer was cut at the token budget.", "", "finish_reason == 'length'"),
    _c(
        "parse_status",
        "string",
        "ok, no_answer, timeout or error, from the grader; after a timeout of the grader itself the score is null, "
        "after one of the model's program it is 0.",
    ),
    _c("answer_extracted", "string", "The answer that the grader found in the text, or the likeliest given one."),
    _c("grader", "string", "Name and version of what graded the answer; null in rows of earlier versions."),
    _c("score", "float", "The suite's primary metric for this sample."),
    _c(
        "score_valid",
        "bool",
        "False for untrained memory, beyond the trained context and where the grader could not decide in time: never "
        "in a headline.",
    ),
    _c(
        "prefill_ms",
        "float",
        "Forward pass over the prompt; in a batch the one that read it, with the prompts that came beside it.",
        "ms",
    ),
    _c(
        "ttft_ms",
        "float",
        "Start, in a batch the sample's own, to its first token known on the host (engine TTFT: no queue).",
        "ms",
    ),
    _c(
        "decode_ms",
        "float",
        "Everything after the prefill, injections included; in a batch also what was done meanwhile for the others.",
        "ms",
        "e2e_ms - prefill_ms",
    ),
    _c(
        "e2e_ms",
        "float",
        "Start, in a batch the sample's own, to its last token known on the host; no tokenisation, no grading, neither "
        "its own nor that of others.",
        "ms",
    ),
    _c(
        "tpot_ms",
        "float",
        "Mean time per text token after the first; null below two tokens.",
        "ms",
        "(e2e_ms - ttft_ms) / (output_tokens - 1)",
    ),
    _c("sample_ms", "float", "Choosing the next token from the logits and bringing it to the host.", "ms"),
    _c(
        "monitor_ms",
        "float",
        "Computing the trigger's signal, in a batch for any sample meanwhile; null unless exec is eager.",
        "ms",
    ),
    _c(
        "consolidate_ms",
        "float",
        "Making memories from the cache, in a batch for any sample while this one was under way.",
        "ms",
    ),
    _c(
        "inject_ms",
        "float",
        "Passing memories through the backbone, in a batch for any sample while this one was under way.",
        "ms",
    ),
    _c(
        "overhead_share",
        "float",
        "Share of the time after the prefill that the method itself takes.",
        "share",
        "(monitor_ms + consolidate_ms + inject_ms) / (e2e_ms - prefill_ms)",
    ),
    _c(
        "harness_ms",
        "float",
        "Time of this sample outside the generation: rendering, grading, writing.",
        "ms",
    ),
    _c(
        "peak_alloc_bytes",
        "int",
        "Peak memory allocated on the device while the sample was under way, by the whole batch; null on a CPU.",
        "bytes",
    ),
    _c(
        "checkpoint_scope",
        "string",
        "Trained for this suite, jointly, or transferred: suite, joint, transfer.",
    ),
    _c("tau_source", "string", "Where the threshold was calibrated: suite or model."),
    _c("beyond_trained_context", "bool", "The prompt is longer than the backbone's trained context."),
    _DEVICE,
    _DTYPE,
    _BATCH,
    _EXEC,
    _c("error", "string", "What went wrong with this sample; null when nothing did."),
)

METRIC_COLUMNS: tuple[Column, ...] = (
    _CELL,
    _SUITE,
    _METHOD,
    _c("sample_id", "string", "Id of the sample."),
    _c("metric", "string", "Name of the metric."),
    _c("value", "float", "Its value for this sample."),
)

_SCORE_BLOCK: tuple[Column, ...] = (
    _c("n", "int", "Samples with a row."),
    _c(
        "n_scored",
        "int",
        "Samples with a valid score; the base of the score.",
        "",
        "count(score_valid and score)",
    ),
    _c("score", "float", "Mean score over the valid samples.", "share", "mean(score)"),
    _c("score_low", "float", "Lower end of the 95 % interval.", "share"),
    _c("score_high", "float", "Upper end of the 95 % interval.", "share"),
    _c(
        "score_interval",
        "string",
        "Method of the interval.",
        "",
        "clustered where samples share a cluster: Student's t on the clustered standard error; else wilson when all "
        "scores are 0 or 1, or all equal; else percentile bootstrap, 10,000 resamples, fixed seed",
    ),
)

_USE_BLOCK: tuple[Column, ...] = (
    _c(
        "no_answer_rate",
        "float",
        "Samples in whose text no answer was found.",
        "share",
        "mean(parse_status == 'no_answer')",
    ),
    _c("truncated_rate", "float", "Answers cut at the token budget.", "share", "mean(truncated)"),
    _c("error_rate", "float", "Samples that failed.", "share", "mean(error is not null)"),
    _c("triggers_mean", "float", "Injections per sample.", "", "mean(triggers)"),
    _c("latents_mean", "float", "Latent positions per sample.", "tokens", "mean(latent_tokens)"),
    _c(
        "trigger_rate",
        "float",
        "Injections per decision step, pooled.",
        "share",
        "sum(triggers) / sum(1 + output_tokens)",
    ),
    _c("trigger_rate_low", "float", "Lower end of its 95 % bootstrap interval.", "share"),
    _c("trigger_rate_high", "float", "Upper end of its 95 % bootstrap interval.", "share"),
    _c(
        "above_tau_rate",
        "float",
        "Mean of the samples' rates of steps above the threshold.",
        "share",
        "mean(above_tau_rate)",
    ),
    _c(
        "threshold",
        "float",
        "Threshold of the trigger; the mean when it differs by stratum.",
        "nats",
        "mean(threshold)",
    ),
)

_COST_BLOCK: tuple[Column, ...] = (
    _c(
        "ms_per_token",
        "float",
        "Time per text token with the prefill.",
        "ms",
        "sum(e2e_ms) / sum(output_tokens)",
    ),
    _c("ms_per_token_low", "float", "Lower end of its 95 % bootstrap interval.", "ms"),
    _c("ms_per_token_high", "float", "Upper end of its 95 % bootstrap interval.", "ms"),
    _c(
        "decode_ms_per_token",
        "float",
        "Time per text token without the prefill.",
        "ms",
        "sum(decode_ms) / sum(output_tokens)",
    ),
    _c("decode_ms_per_token_low", "float", "Lower end of its 95 % bootstrap interval.", "ms"),
    _c("decode_ms_per_token_high", "float", "Upper end of its 95 % bootstrap interval.", "ms"),
    _c("e2e_ms_median", "float", "Median time per sample.", "ms", "median(e2e_ms)"),
    _c("e2e_ms_low", "float", "Lower end of the median's 95 % order-statistic interval.", "ms"),
    _c("e2e_ms_high", "float", "Upper end of the median's 95 % order-statistic interval.", "ms"),
    _c(
        "timed_attempt",
        "int",
        "The attempt that all times of this row come from: the one with the most samples that count, the later of two; "
        "times of different attempts are never pooled. Null where no sample has a time that counts.",
    ),
    _c(
        "timed_samples",
        "int",
        "Samples of that attempt that the times rest on.",
        "",
        "count(attempt == timed_attempt and timing_valid is not false and e2e_ms)",
    ),
)

RUN_COLUMNS: tuple[Column, ...] = (
    _CELL,
    _SUITE,
    _METHOD,
    _MODEL,
    _SEED,
    _TRAIN_SEED,
    _DEVICE,
    _DTYPE,
    _BATCH,
    _EXEC,
    _c("role", "string", "main: in the headline tables; ablation: only on its axis' sheet."),
    _c("settings", "string", "Settings in which cells of the same suite and method differ."),
    _c("status", "string", "complete, or partial when the last attempt was stopped or samples failed."),
    *_SCORE_BLOCK,
    _c("published_score", "float", "The paper's score with this method, suite and backbone; null without.", "share"),
    _c(
        "delta_vanilla",
        "float",
        "Score minus vanilla's on the same samples.",
        "share",
        "mean(score - score of vanilla)",
    ),
    _c("delta_low", "float", "Lower end of the paired bootstrap 95 % interval.", "share"),
    _c("delta_high", "float", "Upper end of the paired bootstrap 95 % interval.", "share"),
    _c(
        "time_ratio",
        "float",
        "Time against vanilla, same prompts, with prefill.",
        "",
        "exp(mean(log(e2e_ms / e2e_ms of vanilla)))",
    ),
    _c(
        "decode_time_ratio",
        "float",
        "Time against vanilla, same prompts, without prefill.",
        "",
        "exp(mean(log(decode_ms / decode_ms of vanilla)))",
    ),
    _c(
        "same_text_share",
        "float",
        "Samples whose text is exactly vanilla's.",
        "share",
        "mean(text == text of vanilla)",
    ),
    _c("why_equal", "string", "Why texts equal vanilla's, as the runner knows it."),
    *_USE_BLOCK,
    _c(
        "trigger_precision",
        "float",
        "Mean over samples with marked moments.",
        "share",
        "mean(trigger_precision)",
    ),
    _c("trigger_recall", "float", "Mean over samples with marked moments.", "share", "mean(trigger_recall)"),
    _c("prompt_tokens_mean", "float", "Prompt tokens per sample.", "tokens", "mean(prompt_tokens)"),
    _c("output_tokens_mean", "float", "Text tokens per sample.", "tokens", "mean(output_tokens)"),
    _c(
        "positions_encoded_mean",
        "float",
        "Positions through the backbone per sample.",
        "tokens",
        "mean(positions_encoded)",
    ),
    _c(
        "reused_share",
        "float",
        "Share of the positions of sessions that a kept history spared; null without sessions.",
        "share",
        "sum(positions_reused) / sum(positions_reused + positions_encoded)",
    ),
    *_COST_BLOCK,
    _c("e2e_ms_p95", "float", "95th percentile of the time per sample.", "ms", "percentile(e2e_ms, 95)"),
    _c("e2e_ms_p99", "float", "99th percentile; null below 500 samples.", "ms", "percentile(e2e_ms, 99)"),
    _c("ttft_ms_median", "float", "Median engine TTFT.", "ms", "median(ttft_ms)"),
    _c("tpot_ms_median", "float", "Median TPOT.", "ms", "median(tpot_ms)"),
    _c("prefill_ms_mean", "float", "Prefill per sample.", "ms", "mean(prefill_ms)"),
    _c(
        "plain_ms_mean",
        "float",
        "Decoding itself per sample.",
        "ms",
        "mean(decode_ms - monitor_ms - consolidate_ms - inject_ms)",
    ),
    _c("monitor_ms_mean", "float", "Monitor per sample.", "ms", "mean(monitor_ms)"),
    _c("consolidate_ms_mean", "float", "Consolidation per sample.", "ms", "mean(consolidate_ms)"),
    _c("inject_ms_mean", "float", "Injection per sample.", "ms", "mean(inject_ms)"),
    _c(
        "overhead_share",
        "float",
        "Share of the time after the prefill that the method takes.",
        "share",
        "sum(monitor_ms + consolidate_ms + inject_ms) / sum(e2e_ms - prefill_ms)",
    ),
    _c(
        "harness_share",
        "float",
        "Share of the wall time outside the model.",
        "share",
        "sum(harness_ms) / sum(e2e_ms + harness_ms)",
    ),
    _c("peak_alloc_bytes", "int", "Highest peak of device memory.", "bytes", "max(peak_alloc_bytes)"),
    _c("checkpoint_scope", "string", "suite, joint or transfer."),
    _c("tau_source", "string", "suite or model."),
    _c("beyond_trained_context", "bool", "Any prompt was longer than the trained context."),
    _c("attempts", "int", "Starts of the command that made these rows."),
)

STRATUM_COLUMNS: tuple[Column, ...] = (
    _CELL,
    _SUITE,
    _METHOD,
    _c("stratum", "string", "Group of samples."),
    *_SCORE_BLOCK,
)

SEED_COLUMNS: tuple[Column, ...] = (
    _SUITE,
    _METHOD,
    _c("model", "string", "Backbone."),
    _c("checkpoint_scope", "string", "suite, joint or transfer."),
    _c("train_seeds", "string", "Training seeds of the runs, ascending."),
    _c("n", "int", "Samples that all runs and vanilla have."),
    _c("seed_scores", "string", "Mean score of each run, in the order of the seeds.", "share"),
    _c("score", "float", "Mean over seeds and samples.", "share"),
    _c("score_low", "float", "Lower end of its 95 % bootstrap interval over seeds and samples together.", "share"),
    _c("score_high", "float", "Upper end of that interval.", "share"),
    _c(
        "within_run_se",
        "float",
        "Standard error of a run's mean from its samples, clustered where they share a cluster.",
        "share",
        "sqrt(mean(se ** 2))",
    ),
    _c("between_seed_sd", "float", "Standard deviation of the runs' means.", "share", "sd(mean score of each seed)"),
    _c("delta_vanilla", "float", "Paired difference from vanilla, mean over seeds.", "share"),
    _c("delta_low", "float", "Lower end of its 95 % bootstrap interval over seeds and samples together.", "share"),
    _c("delta_high", "float", "Upper end of that interval.", "share"),
)

COMPARISON_COLUMNS: tuple[Column, ...] = (
    _SUITE,
    _c(
        "kind",
        "string",
        "baseline: against vanilla; placebo: against a control; rival: against another method.",
    ),
    _c("a", "string", "Method whose gain is asked."),
    _c("b", "string", "Method that it is compared with."),
    _c("cell_a", "string", "Cell of a."),
    _c("cell_b", "string", "Cell of b."),
    _c("n", "int", "Samples that both have, with equal prompts."),
    _c("difference", "float", "Paired difference of the scores.", "share", "mean(score of a - score of b)"),
    _c("low", "float", "Lower end of the paired bootstrap 95 % interval.", "share"),
    _c("high", "float", "Upper end of the paired bootstrap 95 % interval.", "share"),
    _c("fixed", "int", "Samples that a scores higher."),
    _c("broken", "int", "Samples that a scores lower."),
    _c(
        "p_value",
        "float",
        "Two-sided: exact McNemar on fixed and broken, Wilcoxon signed-rank for graded scores; Student's t on the "
        "clustered standard error where samples share a cluster.",
    ),
    _c("family", "string", "primary: chosen before any run (claims.yaml); other: every other comparison."),
    _c("p_adjusted", "float", "The p-value for as many tests: Holm where primary, Benjamini-Hochberg elsewhere."),
    _c("tests", "int", "Tests in its family."),
    _c("n_timed", "int", "Of those, samples that both have in the attempt that their cell's times come from."),
    _c(
        "time_ratio",
        "float",
        "Time of a over b, with prefill, on those.",
        "",
        "exp(mean(log(e2e_ms of a / e2e_ms of b)))",
    ),
    _c("time_ratio_low", "float", "Lower end of its 95 % bootstrap interval."),
    _c("time_ratio_high", "float", "Upper end of its 95 % bootstrap interval."),
    _c(
        "decode_time_ratio",
        "float",
        "The same without prefill.",
        "",
        "exp(mean(log(decode_ms of a / decode_ms of b)))",
    ),
    _c("decode_time_ratio_low", "float", "Lower end of its 95 % bootstrap interval."),
    _c("decode_time_ratio_high", "float", "Upper end of its 95 % bootstrap interval."),
    _c("unequal", "string", "What differs between the two besides the method; null in an ordinary comparison."),
    _c(
        "same_text_share",
        "float",
        "Samples with exactly equal texts.",
        "share",
        "mean(text of a == text of b)",
    ),
    _c(
        "verdict",
        "string",
        "better or worse when interval and adjusted p-value (below 0.05) both say so, else cannot tell.",
    ),
)

_ITL_BLOCK: tuple[Column, ...] = tuple(
    _c(f"itl_{kind}_ms_p{q}", "float", f"{q}th percentile of the gaps between tokens {what}{more}.", "ms")
    for kind, what in (("plain", "without a memory between them"), ("trigger", "with a memory between them"))
    for q, more in ((50, ""), (90, ""), (95, ""), (99, "; null below 500 gaps"))
)

LATENCY_COLUMNS: tuple[Column, ...] = (
    _METHOD,
    _MODEL,
    _c("random_weights", "bool", "The backbone has random weights: cost only."),
    _DEVICE,
    _DTYPE,
    _BATCH,
    _EXEC,
    _c("protocol", "string", "Name of the timing protocol."),
    _c("context", "int", "Prompt length.", "tokens"),
    _c("run", "int", "Number of the timed run."),
    _c("output_tokens", "int", "Text tokens generated.", "tokens"),
    _c("latent_tokens", "int", "Latent positions injected.", "tokens"),
    _c("triggers", "int", "Injections made."),
    _c("positions_encoded", "int", "Positions that went through the backbone.", "tokens"),
    _c("positions_woven", "int", "Positions that went through a second model.", "tokens"),
    _c("prefill_ms", "float", "Forward pass over the prompt.", "ms"),
    _c("ttft_ms", "float", "Start to the first token on the host.", "ms"),
    _c("decode_ms", "float", "Everything after the prefill.", "ms", "e2e_ms - prefill_ms"),
    _c("e2e_ms", "float", "Start to the last token on the host.", "ms"),
    _c("monitor_ms", "float", "Computing the trigger's signal; null unless exec is eager.", "ms"),
    _c("consolidate_ms", "float", "Making memories.", "ms"),
    _c("inject_ms", "float", "Passing memories through the backbone.", "ms"),
    _c("tpot_ms", "float", "Time per output token after the first.", "ms", "(e2e_ms - ttft_ms) / (output_tokens - 1)"),
    _c("step_ms", "float", "Single tokens through the backbone, the monitor's part in it.", "ms"),
    _c("sample_ms", "float", "Choosing tokens and bringing them to the host.", "ms"),
    *_ITL_BLOCK,
    _c(
        "text_tok_s",
        "float",
        "Text tokens a second after the prefill.",
        "1/s",
        "(output_tokens - 1) / decode_ms * 1000",
    ),
    _c(
        "positions_s",
        "float",
        "Positions through the backbone a second after the prefill, latents and what is encoded again included.",
        "1/s",
        "(positions_encoded - context) / decode_ms * 1000",
    ),
    _c(
        "unaccounted_share",
        "float",
        "Part of the time that lies in no phase.",
        "share",
        "1 - (prefill_ms + step_ms + sample_ms + consolidate_ms + inject_ms) / e2e_ms",
    ),
    _c("timing_consistent", "bool", "The phases add up to the whole within 2 %."),
    _c("bytes_token", "float", "Least memory traffic a text token of the decode, by formula.", "bytes"),
    _c("flops_token", "float", "Least operations a text token of the decode, by formula.", "FLOP"),
    _c(
        "bandwidth_share",
        "float",
        "That traffic over the time, as a share of the copy bandwidth that the command measured.",
        "share",
        "bytes_token * output_tokens / decode_s / bytes_s of a copy",
    ),
    _c(
        "flops_share",
        "float",
        "Those operations over the time, as a share of the matrix product that the command measured.",
        "share",
        "flops_token * output_tokens / decode_s / FLOP/s of a matrix product",
    ),
    _c("peak_alloc_bytes", "int", "Peak memory allocated on the device, in a run of its own.", "bytes"),
    _c("peak_reserved_bytes", "int", "Peak memory that the allocator held, in the same run.", "bytes"),
)

ABLATION_COLUMNS: tuple[Column, ...] = (
    _c("axis", "string", "Name of the ablation axis."),
    _c("value", "string", "Setting on this axis."),
    _c("value_number", "float", "The setting as a number (85 for p85), null when it is none."),
    _c("reference", "bool", "The point that the other values are compared with."),
    _c("reference_cell", "string", "Cell of the reference point that this point belongs to."),
    _CELL,
    _SUITE,
    _METHOD,
    _MODEL,
    _SEED,
    _DEVICE,
    _DTYPE,
    _BATCH,
    *_SCORE_BLOCK,
    _c("delta_reference", "float", "Score minus the reference point's on the same samples.", "share"),
    _c("delta_low", "float", "Lower end of the paired bootstrap 95 % interval.", "share"),
    _c("delta_high", "float", "Upper end of the paired bootstrap 95 % interval.", "share"),
    *_USE_BLOCK,
    *_COST_BLOCK,
)

CLAIM_COLUMNS: tuple[Column, ...] = (
    _c("id", "string", "Short name of the claim."),
    _c("claim", "string", "The statement that is tested."),
    _c("source", "string", "Where the paper says so, or that it is a control of ours."),
    _c("test", "string", "better, no-worse, faster, falls or no-harm; claims.yaml says what each asks."),
    _SUITE,
    _MODEL,
    _DEVICE,
    _c("a", "string", "Method that the claim is about."),
    _c("b", "string", "Method that decides: of several the least favourable one."),
    _c("verdict", "string", "supported, not supported or cannot tell."),
    _c(
        "estimate",
        "float",
        "What decides: difference of scores, ratio of times, fall in nats, or share broken.",
    ),
    _c("low", "float", "Lower end of its 95 % interval."),
    _c("high", "float", "Upper end of its 95 % interval."),
    _c("n", "int", "Samples behind it; runs where times decide."),
    _c("seeds", "int", "Training seeds behind it, drawn together with the samples; null where nothing was trained."),
    _c("margin", "float", "Share that still counts as no worse, or as no harm."),
    _c("margin_fixed_at", "string", "When the results folder fixed its margins, before its first run; null if never."),
    _c("p_value", "float", "Two-sided; of several comparisons the largest."),
    _c("p_adjusted", "float", "The same after Holm's adjustment over all claims that scores decide."),
    _c("why", "string", "Reason of the verdict, with the numbers beside it."),
)

TRAINING_COLUMNS: tuple[Column, ...] = (
    _c("checkpoint", "string", "Folder of the memory, below the results folder where it lies there."),
    _MODEL,
    _c("suites", "string", "Suites that the memory was trained on, separated by commas."),
    _METHOD,
    _TRAIN_SEED,
    _c("step", "int", "Optimiser step, from 1."),
    _c("progress", "float", "Share of the run that was done when the step began.", "share"),
    _c("loss_nats_token", "float", "Mean loss over the step's target tokens.", "nats"),
    _c("validation_loss_nats_token", "float", "The same on held-out examples; null where not measured.", "nats"),
    _c("grad_norm", "float", "Norm of the gradient before clipping."),
    _c("lr", "float", "Learning rate of the step."),
    _c("target_tokens", "int", "Target tokens trained on up to here.", "tokens"),
    _c("seconds", "float", "Time of training up to here, interruptions left out."),
    _c("best_step", "int", "Step whose parameters the memory has; null where it has the last one's."),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "samples": SAMPLE_COLUMNS,
    "metrics": METRIC_COLUMNS,
    "runs": RUN_COLUMNS,
    "strata": STRATUM_COLUMNS,
    "seeds": SEED_COLUMNS,
    "comparisons": COMPARISON_COLUMNS,
    "latency": LATENCY_COLUMNS,
    "ablations": ABLATION_COLUMNS,
    "training": TRAINING_COLUMNS,
    "claims": CLAIM_COLUMNS,
}


def column_names(columns: Sequence[Column]) -> list[str]:
    """Names of the columns, in order."""
    return [column.name for column in columns]


def find_column(name: str) -> list[tuple[str, Column]]:
    """All columns of that name as (table, column) pairs; empty when there is none."""
    return [(table, column) for table, columns in TABLES.items() for column in columns if column.name == name]


_TYPES: dict[str, tuple[type, ...]] = {"string": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}


def wrong_type(row: Mapping[str, Any]) -> str | None:
    """Name of the first sample column, or further metric, whose value is not of its type; None where all are."""
    odd = (column.name for column in SAMPLE_COLUMNS if not _is_of(row.get(column.name), column.dtype))
    metrics = (key for key, value in row.items() if key.startswith(METRIC_PREFIX) and not _is_of(value, "float"))
    return next(odd, None) or next(metrics, None)


def _is_of(value: Any, dtype: DType) -> bool:
    if value is None:
        return True
    # A table holds whole numbers of 64 bits.
    return type(value) in _TYPES[dtype] and (type(value) is not int or -(2**63) <= value < 2**63)


_TEXT_TYPES: dict[str, type] = {
    "prompt": str, "text": str, "tokens": list, "triggers": list, "entropies": list, "output_entropies": list,
}  # fmt: skip


def wrong_text_type(text: Mapping[str, Any]) -> str | None:
    """Name of the first entry of a text record whose value is not of its type; None where all are."""
    odd = (name for name, kind in _TEXT_TYPES.items() if not isinstance(text.get(name, kind()), kind))
    return next(odd, None)


def blank_sample() -> dict[str, Any]:
    """A sample row with every column present and null, for the runner to fill."""
    return dict.fromkeys(column_names(SAMPLE_COLUMNS))


def arrow_schema(columns: Sequence[Column]) -> pyarrow.Schema:
    """The pyarrow schema of a table, with unit, formula and description as field metadata."""
    import pyarrow as pa

    types = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    fields = [
        pa.field(
            column.name,
            types[column.dtype],
            metadata={"unit": column.unit, "formula": column.formula, "description": column.description},
        )
        for column in columns
    ]
    return pa.schema(fields, metadata={"project": "flashmem-bench", "schema_version": str(SCHEMA_VERSION)})
