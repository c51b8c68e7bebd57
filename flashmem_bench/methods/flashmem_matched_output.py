"""`flashmem-matched-output`: the output's entropy as the trigger, with as many memories as attention's.

The same percentile of two entropies need not fire equally often in an answer. Here the percentile of the calibrated
output entropies is that of the rate at which the `flashmem` cell fired over its eligible steps, so that the two differ
in what they watch and hardly in how often they write; the tables say what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flashmem_bench.methods.base import MethodSpec, ReferenceSample
from flashmem_bench.methods.flashmem_random_trigger import REFERENCE, pooled_rate
from flashmem_bench.methods.latent import USES, build_latent

if TYPE_CHECKING:
    from flashmem_bench.settings import Settings


def match(how: str, settings: Settings, reference: Mapping[str, ReferenceSample]) -> dict[str, Any]:
    """Return the percentile of the output entropies that is exceeded as often as the reference fired."""
    rate = pooled_rate(reference, settings.trigger.cooldown, settings.trigger.max_injections)
    return {"trigger.percentile": round(100 * (1 - rate), 3)}


SPEC = MethodSpec(
    name="flashmem-matched-output",
    summary="flashmem-output-entropy with tau where it fires as often as a flashmem cell",
    build=build_latent,
    fixed={"trigger.kind": "output-entropy"},
    memory_of="flashmem",
    uses=USES,
    reference=REFERENCE,
    match=match,
)
