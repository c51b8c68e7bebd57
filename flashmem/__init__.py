"""FlashMem: latent memory for a frozen causal language model."""
