"""What the paper claims, as data: `claims.yaml` beside this file.

A claim is a test over cells. Its margin must be fixed before anything is known, so a results folder keeps the margins
of the day on which it was begun (`pin`), and the report tests with those and says where they have changed since.
Nothing is evaluated here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from flashmem_bench.durable import replace, write_failure
from flashmem_bench.errors import DataError

PINNED = "margins.json"
Test = Literal["better", "no-worse", "faster", "falls", "no-harm"]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        id: Short name.
        says: The statement.
        source: Where the paper says so, or that it is a control of ours.
        test: What decides; see `claims.yaml`.
        a: The method that the claim is about.
        b: Methods that it is compared with; every one of them must agree.
        margin: Share that still counts as no worse, or as no harm.
        assay: Methods that b must beat before being no worse than it means anything.
        beside: Methods that are shown beside the estimate.
        axis: Ablation axis whose points are compared, the reference being a.
        context: Tokens of the prompt, where time is compared.
        ratio: How many times as fast.
    """

    id: str
    says: str
    source: str
    test: Test
    a: str
    b: tuple[str, ...]
    margin: float
    assay: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    axis: str | None = None
    context: int | None = None
    ratio: float | None = None

    @property
    def scores(self) -> bool:
        """Whether scores decide."""
        return self.test in ("better", "no-worse")


@lru_cache
def load_claims() -> tuple[Claim, ...]:
    """Return the claims in their order.

    Raises:
        DataError: The file is broken: an unknown test, or two claims of one name.
    """
    document = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
    return claims_of(document)


def claims_of(document: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Return the claims of a parsed file.

    Raises:
        DataError: An unknown test or field, or two claims of one name.
    """
    found = []
    for entry in document["claims"]:
        lists = {key: tuple(entry[key]) for key in ("b", "assay", "beside") if key in entry}
        try:
            found.append(Claim(**{"margin": document["margin"], **entry, **lists}))
        except TypeError as error:
            raise DataError(f"claim {entry.get('id')!r} of claims.yaml: {error}") from error
        if found[-1].test not in get_args(Test):
            raise DataError(f"claim {entry['id']!r} of claims.yaml has the unknown test {entry['test']!r}")
    if len({claim.id for claim in found}) < len(found):
        raise DataError("two claims of claims.yaml have the same id")
    return tuple(found)


def primary_pairs() -> frozenset[tuple[str, str]]:
    """Return the comparisons of scores that were chosen before any run: (a, b)."""
    return frozenset((c.a, b) for c in load_claims() if c.scores and c.axis is None for b in c.b)


def pin(root: Path, stamp: str) -> None:
    """Write the margins into a results folder that has none yet; once there, they stay.

    Args:
        root: The results folder.
        stamp: The time, ISO 8601.
    """
    path = root / PINNED
    if path.exists() or (root / "runs").exists():
        return
    document = {"fixed_at": stamp, "margins": {claim.id: claim.margin for claim in load_claims()}}
    try:
        replace(path, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        raise write_failure(path, error) from error


def pinned(root: Path) -> tuple[dict[str, float], str | None]:
    """Return the margins that a results folder was begun with and when; empty and None where it has none."""
    try:
        document = json.loads((root / PINNED).read_text(encoding="utf-8"))
        return {str(k): float(v) for k, v in document["margins"].items()}, str(document["fixed_at"])
    except (OSError, ValueError, KeyError, AttributeError):
        return {}, None
