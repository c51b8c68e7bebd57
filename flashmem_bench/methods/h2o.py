"""`h2o`: after the prefill, the newest positions and the heavy hitters stay (Zhang et al., 2023).

The score is in `flashmem.eviction`.
"""

from __future__ import annotations

from flashmem_bench.methods.evicting import eviction_spec

SPEC = eviction_spec("h2o", "KV eviction after prefill: the newest positions and the heavy hitters stay")
