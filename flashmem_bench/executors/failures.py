"""The row of a sample that the one who should have answered it could not even report as failed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from flashmem_bench.answers import Finished
from flashmem_bench.rows import sample_row, text_record

if TYPE_CHECKING:
    from flashmem_bench.prepare import CellPlan
    from flashmem_bench.tasks import Sample


def failed(plan: CellPlan, index: int, sample: Sample, error: str) -> Finished:
    """Return what is known of a sample without a tokenizer and a model.

    Args:
        plan: Its cell.
        index: Its position in the suite's order.
        sample: The sample.
        error: What went wrong, a sentence.
    """
    known = {
        "sample_id": sample.sample_id,
        "index": index,
        "stratum": sample.stratum,
        "cluster": sample.cluster,
        "session_id": sample.session_id,
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "error": error,
        "score_valid": False,
    }
    return Finished(sample_row(plan.common, known), text_record(sample, None, None))
