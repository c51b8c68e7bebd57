"""MemGen's trained trigger (Zhang et al., 2025): a second model that may refuse a memory.

A LoRA copy of the backbone reads the token ids of the text, latents left out and without a cache, and a linear map of
the last hidden state gives two logits: go on, or write a memory. It is asked at the prompt end and at each delimiter
that the cap still allows. The released evaluation scripts switch it off, and then every such place gets a memory; so
does a weaver without one (`MemoryConfig.trained_trigger`). It is fitted by `flashmem.trigger_training`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashmem.backbone import Backbone
from flashmem.encoder import adapt, copy_layers


class TriggerModel(nn.Module):
    """Says at a place of a text whether a memory should be written there.

    Attributes:
        stream: while it is trained, what its answers are drawn from; None answers with the larger logit.
    """

    def __init__(self, backbone: Backbone, rank: int) -> None:
        super().__init__()
        reader = copy_layers(backbone, backbone.num_layers)
        self.adapters = nn.ModuleList(adapt(reader, rank))
        self.head = nn.Linear(backbone.hidden_size, 2)
        self.to(backbone.device, backbone.dtype)
        # In a tuple, so that the frozen weights are no parameters of this module.
        self.reader = (reader,)
        self.stream: torch.Generator | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probabilities `[B, T, 2]` of going on and of writing behind each of the token ids `[B, T]`."""
        reader = self.reader[0]
        hidden = reader.extend(reader.empty_state(ids.shape[0], keep_inputs=False), reader.embed(ids))
        return self.head(hidden).float().log_softmax(-1)

    def says(self, ids: list[int]) -> bool:
        """Whether a memory should be written behind these T token ids. Costs one pass over all of them."""
        device = self.head.weight.device
        go_on, write = self(torch.tensor([ids], device=device))[0, -1].exp().tolist()
        if self.stream is None:
            return write > go_on
        return float(torch.rand((), generator=self.stream)) < write
