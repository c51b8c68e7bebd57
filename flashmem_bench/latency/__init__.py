"""What FlashMem and its rivals cost at fixed contexts, measured in interleaved runs; no score is ever given.

    protocol    what one run does
    arms        what is timed of each method
    timing      one timed run, checked against the formula of its positions, as a row
    interleave  methods in turns until their ratios are known
    work        the least bytes and operations of a run
    shapes      backbones of real shapes with random weights
    machine     clocks, temperature, other processes
    files       rows on disk

Needs torch, transformers, numpy and scipy; neither lm-eval, datasets nor pydantic.
"""

from flashmem_bench.latency.files import read_rows

__all__ = ["read_rows"]
