"""The loss of a memory: cross-entropy of what follows it, through the frozen layers.

A training sequence is [x, M, y]. The prefix x is prefilled without gradient, the source writes M from its state, and
[M, y] runs on that cache with gradients through the frozen layers to M; only y counts. Beside the loss stands the
attention entropy of a teacher-forced answer, which says where the trigger would have fired.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from flashmem.backbone import Backbone, DecodeState
from flashmem.memory import MemoryContext, MemorySource
from flashmem.training_recompute import recomputing

_IGNORE = -100


def sequence_loss(
    backbone: Backbone,
    memory: MemorySource,
    prefixes: list[list[int]],
    targets: list[list[int]],
    *,
    recompute: bool = False,
) -> tuple[Tensor, int]:
    """Cross-entropy of the targets after [prefix, M], summed over tokens, and the number of tokens.

    Args:
        backbone: frozen.
        memory: the source that writes M from the state at the end of each prefix.
        prefixes: token ids before M.
        targets: token ids after M, each at least one long.
        recompute: keep no activations of the layers, run them again in the backward pass.
    """
    with torch.no_grad():
        state = backbone.prefill(prefixes, keep_inputs=memory.needs_history)
    ids, labels = _right_pad(targets, backbone)
    with recomputing(backbone, memory, state) if recompute else nullcontext():
        latents = memory(MemoryContext(backbone, state, [0] * len(prefixes)))
        # The last target token predicts nothing that counts, so it is not fed.
        embeds = torch.cat([latents.to(backbone.dtype), backbone.embed(ids[:, :-1])], 1)
        hidden = backbone.extend(state, embeds)
    kept = hidden[:, latents.shape[1] - 1 :]
    loss = torch.nn.functional.cross_entropy(
        backbone.logits(kept).flatten(0, 1), labels.flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    return loss, int((labels != _IGNORE).sum())


def target_entropies(backbone: Backbone, prompts: list[list[int]], targets: list[list[int]]) -> list[list[float]]:
    """Attention entropy at the decision step before each target token, nats; see `step_entropies`."""
    return step_entropies(backbone, prompts, targets)["attention"]


def step_entropies(
    backbone: Backbone, prompts: list[list[int]], targets: list[list[int]]
) -> dict[str, list[list[float]]]:
    """Entropies at the decision step before each target token, teacher-forced, nats; one list a row.

    Entry 0 is the prompt end. Prompts need two tokens or more. Rows of the monitored layer only, never T x T.

    Returns:
        "attention" and "output" (of the next-token distribution).
    """
    with torch.no_grad():
        # The prompt's last token opens the second pass: its row is the prompt-end decision.
        state: DecodeState = backbone.prefill([p[:-1] for p in prompts])
        ids, _ = _right_pad(targets, backbone)
        last = torch.tensor([[p[-1]] for p in prompts], device=backbone.device)
        backbone.observe(True, rows=ids.shape[1])
        try:
            hidden = backbone.extend(state, backbone.embed(torch.cat([last, ids[:, :-1]], 1)))
            attention = backbone.row_entropies()
        finally:
            backbone.observe(False)
        output = torch.distributions.Categorical(logits=backbone.logits(hidden).float()).entropy()
    return {
        name: [row[: len(t)] for row, t in zip(values.tolist(), targets, strict=True)]
        for name, values in (("attention", attention), ("output", output))
    }


def _right_pad(targets: list[list[int]], backbone: Backbone) -> tuple[Tensor, Tensor]:
    width = max(len(t) for t in targets)
    ids = torch.tensor([t + [0] * (width - len(t)) for t in targets], device=backbone.device)
    labels = torch.tensor([t + [_IGNORE] * (width - len(t)) for t in targets], device=backbone.device)
    return ids, labels
