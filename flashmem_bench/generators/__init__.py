"""Seeded suites of the project's own: text made by code, so that they need no download and no licence.

`generate(name, split, n)` gives the rows of one suite. All rows have `id`, `prompt` (the complete user
message), `target` (the complete assistant message), `answer` (the short gold answer) and `stratum`; a
generator may add more keys.
"""

from __future__ import annotations

import importlib
from typing import Any

GENERATORS: dict[str, str] = {
    "wordmath": "flashmem_bench.generators.wordmath",
    "hops": "flashmem_bench.generators.hops",
    "hops-list": "flashmem_bench.generators.hops_list",
    "recall": "flashmem_bench.generators.recall",
}


def generate(name: str, split: str, n: int, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    """The first `n` rows of `split` of suite `name`.

    Raises:
        KeyError: no generator has that name.
        ValueError: an unknown split, or a setting out of range.
    """
    return importlib.import_module(GENERATORS[name]).rows(split, n, seed, **settings)
