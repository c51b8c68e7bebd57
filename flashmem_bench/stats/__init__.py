"""Pure statistics: intervals, paired comparisons, ratios, rankings, families of tests, and power.

Scores get a Wilson interval when every score is 0 or 1, else a percentile bootstrap; where samples share a document,
both give way to the clustered standard error. Two methods on the same samples are always compared in pairs: bootstrap
of the differences, exact McNemar on the samples that changed sides. "No worse than" is a test of its own with a margin.
Times are compared by the geometric mean of the per-prompt ratios, which does not care which method is the numerator.

Seeds are given by the caller, so a report made twice is the same report. Nothing is rounded, no outlier is removed. No
input or output, no torch, no pandas.
"""

from flashmem_bench.stats.families import benjamini_hochberg, holm
from flashmem_bench.stats.intervals import (
    NOTHING,
    RESAMPLES,
    Interval,
    bootstrap_means,
    bootstrap_standard_error,
    clustered_interval,
    clustered_standard_error,
    mean_interval,
    median_interval,
    percentile,
    ratio_of_sums,
    score_interval,
    share_clusters,
    student_interval,
    wilson_interval,
)
from flashmem_bench.stats.pairs import (
    NonInferiority,
    geometric_mean_ratio,
    mcnemar_exact,
    non_inferiority,
    paired_bootstrap,
    paired_difference,
    paired_p,
    seed_difference,
    seeds_and_samples,
    wilcoxon_p,
)
from flashmem_bench.stats.power import minimum_detectable_difference, samples_for_margin, samples_needed
from flashmem_bench.stats.ranking import auroc, precision_at_count, ranking_intervals

__all__ = [
    "NOTHING",
    "RESAMPLES",
    "Interval",
    "NonInferiority",
    "auroc",
    "benjamini_hochberg",
    "bootstrap_means",
    "bootstrap_standard_error",
    "clustered_interval",
    "clustered_standard_error",
    "geometric_mean_ratio",
    "holm",
    "mcnemar_exact",
    "mean_interval",
    "median_interval",
    "minimum_detectable_difference",
    "non_inferiority",
    "paired_bootstrap",
    "paired_difference",
    "paired_p",
    "percentile",
    "precision_at_count",
    "ranking_intervals",
    "ratio_of_sums",
    "samples_for_margin",
    "samples_needed",
    "score_interval",
    "seed_difference",
    "seeds_and_samples",
    "share_clusters",
    "student_interval",
    "wilcoxon_p",
    "wilson_interval",
]
