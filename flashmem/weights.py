"""Numbers measured once on the weights of a frozen model: who it is, and how large its vectors are."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def fingerprint(model: nn.Module) -> str:
    """16 hex digits over a fixed sample of every weight: tells two models apart, not two dtypes."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def embedding_norm(model: PreTrainedModel) -> float:
    """Mean Euclidean norm of the token embeddings as the first layer sees them."""
    table = model.get_input_embeddings()
    sample = torch.arange(min(table.weight.shape[0], 8192), device=model.device)
    return float(table(sample).float().norm(dim=-1).mean())


@torch.no_grad()
def stream_scale(model: PreTrainedModel) -> float:
    """Size of the residual stream before the final norm, with the state after it as the unit; a power of two.

    Measured on ids spread over the vocabulary. The first positions are left out: attention sinks have streams of
    another size.
    """
    streams: list[Tensor] = []
    decoder = model.model
    hook = decoder.norm.register_forward_pre_hook(lambda _, given: streams.append(given[0]))
    ids = torch.linspace(0, model.get_input_embeddings().weight.shape[0] - 1, 64, device=model.device)
    try:
        after = decoder(input_ids=ids.long()[None], use_cache=False).last_hidden_state
    finally:
        hook.remove()
    before, after = (x[0, 8:].float().norm(dim=-1).to("cpu") for x in (streams[0], after))
    return 2.0 ** round(math.log2(float((before / after).median())))
