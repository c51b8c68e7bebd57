"""Splitting the samples of a cell among processes, by sample id.

Which shard a sample belongs to depends on its id (or its session's) and on the number of shards alone: not on the
limit, on what is done already or on who else works. So any process can say by itself which samples are its own. The
questions of one session stay together, because the later ones reuse what the first has encoded. Shards are about
equally large for many samples; nobody is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashmem_bench.errors import UsageError

SHARDS = "shards"

if TYPE_CHECKING:
    from pathlib import Path

    from flashmem_bench.tasks import Sample


@dataclass(frozen=True)
class Shard:
    """One of several parts of the samples.

    Attributes:
        index: From 0.
        count: How many parts there are.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `i/n`, i from 0 to n - 1.

        Raises:
            UsageError: It is something else.
        """
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise UsageError(f"a shard is i/n with i from 0 to n - 1, such as 0/4, not {text!r}")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def owns(self, sample: Sample) -> bool:
        """Return whether a sample is in this part."""
        return shard_of(sample, self.count) == self.index


def shard_folder(results: Path, shard: Shard) -> Path:
    """Return where the rows of a shard go: a results folder of its own."""
    return results / SHARDS / f"{shard.index}-of-{shard.count}"


def shard_of(sample: Sample, count: int) -> int:
    """Return which of `count` parts a sample is in, from 0."""
    key = f"session:{sample.session_id}" if sample.session_id is not None else f"sample:{sample.sample_id}"
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big") % count


def split(batches: Sequence[list[int]], samples: Sequence[Sample], count: int) -> list[list[list[int]]]:
    """Return the batches of each of `count` parts, in the suite's order; a batch goes with its first sample.

    Args:
        batches: Indices of samples.
        samples: All samples of the suite.
        count: Number of parts; some may be empty.
    """
    parts: list[list[list[int]]] = [[] for _ in range(count)]
    for batch in batches:
        parts[shard_of(samples[batch[0]], count)].append(batch)
    return parts
