"""`tova`: after the prefill, what the last query looks at stays (Oren et al., 2024).

The score is in `flashmem.eviction`.
"""

from __future__ import annotations

from flashmem_bench.methods.evicting import eviction_spec

SPEC = eviction_spec("tova", "KV eviction after prefill: what the last query attends to stays")
