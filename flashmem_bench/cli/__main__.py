"""`python -m flashmem_bench.cli` is `flashmem-bench`."""

from __future__ import annotations

from flashmem_bench.cli import main

main()
