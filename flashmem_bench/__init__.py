"""flashmem-bench: runs, times, grades and reports latent-memory methods for frozen language models."""

from __future__ import annotations

__version__ = "0.1.0"
