"""`python -m flashmem_bench` is `flashmem-bench`; launchers such as accelerate start modules."""

from __future__ import annotations

from flashmem_bench.cli import main

main()
