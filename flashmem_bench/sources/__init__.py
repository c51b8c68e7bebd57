"""Where the bundled suites' documents come from: the functions that suite files name as `custom_dataset`.

lm-eval calls such a function with the suite's `metadata` and `dataset_kwargs` as keywords. Our adapter adds
`data_dir`, `skip_bad_rows`, `seed` and `settings`; `lm_eval --metadata '{"data_dir": ...}'` gives the same.
Every document has `id`, `gold` (the right answer, for grading) and `stratum`, `cluster` where it shares a text with
others, and keeps the fields of its source. The order of a split is fixed, so that a larger limit only adds samples.

    made       rows that our generators write
    lengths    generated rows at wanted lengths
    maths      numbers and formulas
    choice     questions with lettered options
    code       programs with tests
    summaries  long texts and what they say in short
    stories    bAbI, its questions one by one or story by story
    haystack   bAbI in book text at wanted lengths
    dialogue   LoCoMo's conversations
    meetings   QMSum's meetings
    histories  what sources of sessions share
    splits     held-out parts of a training file

Held out: calibration and validation are the same rows, the last `held_out` share of a real suite's training
file, or its validation file where it has one. The threshold reads no answers from them and the choice among
checkpoints reads no threshold, so nothing leaks between the two.
"""

from flashmem_bench.sources.choice import arc_challenge, gpqa
from flashmem_bench.sources.code import humaneval, kodcode, mbpp
from flashmem_bench.sources.dialogue import locomo
from flashmem_bench.sources.haystack import babi_long
from flashmem_bench.sources.lengths import hops_long, recall_long
from flashmem_bench.sources.made import generated
from flashmem_bench.sources.maths import gsm8k, gsm_plus, math
from flashmem_bench.sources.meetings import qmsum_session
from flashmem_bench.sources.stories import babi, babi_session
from flashmem_bench.sources.summaries import booksum, govreport, qmsum

__all__ = [
    "arc_challenge",
    "babi",
    "babi_long",
    "babi_session",
    "booksum",
    "generated",
    "govreport",
    "gpqa",
    "gsm8k",
    "gsm_plus",
    "hops_long",
    "humaneval",
    "kodcode",
    "locomo",
    "math",
    "mbpp",
    "qmsum",
    "qmsum_session",
    "recall_long",
]
