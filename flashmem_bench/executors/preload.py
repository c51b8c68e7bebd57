"""What every worker imports, for the process from which workers are forked: that takes seconds, and a fork none."""

from __future__ import annotations

import flashmem.backbone  # noqa: F401
import flashmem_bench.methods.latent
import flashmem_bench.tasks  # noqa: F401
