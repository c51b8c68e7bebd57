"""`streaming-llm`: after the prefill, the first and the newest positions stay (Xiao et al., 2024).

The score is in `flashmem.eviction`.
"""

from __future__ import annotations

from flashmem_bench.methods.evicting import eviction_spec

SPEC = eviction_spec("streaming-llm", "KV eviction after prefill: the first and the newest positions stay")
