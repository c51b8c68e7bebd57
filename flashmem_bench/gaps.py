"""What a recipe lacks, before it runs: data that is not here, and cells without which a claim stays open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashmem_bench.claims import Claim, load_claims
from flashmem_bench.errors import BenchError


def missing_data(suites: Iterable[str], parts: Any) -> list[str]:
    """One sentence for each suite of a recipe whose samples cannot be read now.

    Args:
        suites: Names.
        parts: Of `flashmem_bench.reproduce`; opens sessions.
    """
    found = []
    for name in suites:
        try:
            parts.session((name,), ()).suite(name).samples("test")
        except BenchError as error:
            found.append(f"{name}: {error}")
    return found


def open_claims(methods: Sequence[str]) -> list[str]:
    """One sentence for each claim that these methods alone cannot answer: what it needs besides."""
    lacking = [(claim, _needs(claim, methods)) for claim in load_claims()]
    return [f"{claim.id} needs {needs}" for claim, needs in lacking if needs]


def _needs(claim: Claim, methods: Sequence[str]) -> str:
    if claim.test == "faster":
        # Cells of samples say nothing of a context: times come from the latency protocol.
        wanted = ",".join((claim.a, *claim.b))
        return f"flashmem-bench latency --contexts {claim.context} --method {wanted} on a GPU"
    absent = [name for name in dict.fromkeys((claim.a, *claim.b, *claim.assay)) if name not in methods]
    needs = [", ".join(absent)] if absent else []
    if claim.axis is not None:
        needs.append(f"flashmem-bench ablate {claim.axis} into the same folder")
    return " and ".join(needs)
