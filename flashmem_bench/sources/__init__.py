"""Where the bundled suites' documents come from: the functions that suite files name as `custom_dataset`.

lm-eval calls such a function with the suite's `metadata` and `dataset_kwargs` as keywords. Our adapter adds
`data_dir`, `skip_bad_rows`, `seed` and `settings`; `lm_eval --metadata '{"data_dir": ...}'` gives the same.
Every document has `id`, `gold` (the right answer, for grading) and `stratum`, `cluster` where it shares a text with
others, and keeps the fields of its source. The order of a split is fixed, so that a larger limit only adds samples.

    code      programs with tests
    made      rows that our generators write
    maths     numbers and formulas
    stories   bAbI
    splits    held-out parts of a training file

Held out: calibration and validation are the same rows, the last `held_out` share of a real suite's training
file. The threshold reads no answers from them and the choice among checkpoints reads no threshold, so
nothing leaks between the two.
"""

from flashmem_bench.sources.code import humaneval, kodcode, mbpp
from flashmem_bench.sources.made import generated
from flashmem_bench.sources.maths import gsm8k
from flashmem_bench.sources.stories import babi

__all__ = ["babi", "generated", "gsm8k", "humaneval", "kodcode", "mbpp"]
