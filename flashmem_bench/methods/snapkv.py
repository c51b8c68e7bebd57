"""`snapkv`: after the prefill, what the newest queries of the prompt look at stays (Li et al., 2024).

The score is in `flashmem.eviction`.
"""

from __future__ import annotations

from flashmem_bench.methods.evicting import eviction_spec

SPEC = eviction_spec("snapkv", "KV eviction after prefill: what the newest queries attend to stays")
