"""The loss of a memory: cross-entropy of what follows it, through the frozen layers.

A training sequence is [x, M, y]. The prefix x is prefilled without gradient, the source writes M from its state, and
[M, y] runs on that cache with gradients through the frozen layers to M; only y counts. Beside the loss stand the
entropies of a teacher-forced answer, attention's and the next token's, which say where a trigger would have fired.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from flashmem.backbone import Backbone
from flashmem.lora import LoRA
from flashmem.memory import MemoryContext, MemorySource
from flashmem.state import DecodeState
from flashmem.training_recompute import recomputing

_IGNORE = -100
# Encodes prefixes as `Backbone.prefill` does.
Prefill = Callable[..., DecodeState]


def sequence_loss(
    backbone: Backbone,
    memory: MemorySource,
    prefixes: list[list[int]],
    targets: list[list[int]],
    *,
    recompute: bool = False,
    keep: float = 0.0,
    prefill: Prefill | None = None,
) -> tuple[Tensor, int]:
    """Cross-entropy of the targets after [prefix, M], summed over tokens, and the number of tokens.

    With `keep` above 0 the divergence KL(plain || with memory) of each token that the plain backbone would have got
    right is added, so many times: a memory should leave alone what needs no help.

    Args:
        backbone: frozen.
        memory: the source that writes M from the state at the end of each prefix.
        prefixes: token ids before M.
        targets: token ids after M, each at least one long.
        recompute: keep no activations of the layers, run them again in the backward pass.
        keep: weight of that divergence; 0 is the paper's loss.
        prefill: encodes the prefixes in the place of `Backbone.prefill`.
    """
    with torch.no_grad():
        state = (prefill or backbone.prefill)(prefixes, keep_inputs=memory.needs_history)
        ids, labels = _right_pad(targets, backbone)
        plain = _plain_logits(backbone, state, ids) if keep else None
    with recomputing(backbone, memory, state) if recompute else nullcontext():
        latents = memory(MemoryContext(backbone, state, [0] * len(prefixes)))
        # The last target token predicts nothing that counts, so it is not fed.
        embeds = torch.cat([latents.to(backbone.dtype), backbone.embed(ids[:, :-1])], 1)
        hidden = backbone.extend(state, embeds)
    kept = hidden[:, latents.shape[1] - 1 :]
    logits = backbone.logits(kept)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    if plain is not None:
        loss = loss + keep * _moved(plain, logits, plain.argmax(-1) == labels)
    return loss, int((labels != _IGNORE).sum())


def chained_loss(
    backbone: Backbone,
    memory: MemorySource,
    prompts: list[list[int]],
    pieces: list[list[list[int]]],
    prefill: Prefill | None = None,
) -> tuple[Tensor, int]:
    """Cross-entropy of answers with a memory before each of their pieces, summed over tokens, and their number.

    Gradients of a later piece reach the earlier memories too: all of them lie in one cache. This is MemGen's training.

    Args:
        backbone: frozen.
        memory: writes each memory from the state before its piece.
        prompts: token ids.
        pieces: of each row the token ids of its answer in parts, one or more, none empty.
        prefill: encodes the prompts in the place of `Backbone.prefill`.
    """
    with torch.no_grad():
        state = (prefill or backbone.prefill)(prompts, keep_inputs=memory.needs_history)
    total, tokens = torch.zeros((), device=backbone.device), 0
    for index in range(max(len(row) for row in pieces)):
        latents = memory(MemoryContext(backbone, state, [index] * len(prompts)))
        ids, labels = _right_pad([row[index] if index < len(row) else [] for row in pieces], backbone)
        here = torch.tensor([index < len(row) for row in pieces], device=backbone.device)
        taken = here[:, None].expand(latents.shape[:2])
        counts = [latents.shape[1] + len(row[index]) if index < len(row) else 0 for row in pieces]
        marks = torch.cat([taken, torch.zeros_like(labels, dtype=torch.bool)], 1)
        embeds = torch.cat([latents.to(backbone.dtype), backbone.embed(ids)], 1)
        hidden = backbone.extend(state, embeds, counts=counts, latents=marks)
        logits = backbone.logits(hidden[:, latents.shape[1] - 1 : -1])
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORE, reduction="sum"
        )
        tokens += int((labels != _IGNORE).sum())
        newest = torch.tensor([max(count - 1, 0) for count in counts], device=backbone.device)
        state.hidden = torch.where(here[:, None], hidden[torch.arange(len(prompts)), newest], state.hidden)
    return total, tokens


def adapted_loss(
    backbone: Backbone, adapters: LoRA, prompts: list[list[int]], targets: list[list[int]]
) -> tuple[Tensor, int]:
    """Cross-entropy of the targets after the prompts under LoRA, summed over tokens, and their number.

    One pass over both, with gradients through the prompts too: their keys and values change as well.
    """
    with adapters.applied(backbone):
        state = backbone.prefill(prompts)
        ids, labels = _right_pad(targets, backbone)
        hidden = backbone.extend(state, backbone.embed(ids[:, :-1])) if ids.shape[1] > 1 else None
    first = state.logits[:, None]
    logits = first if hidden is None else torch.cat([first, backbone.logits(hidden)], 1)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORE, reduction="sum"
    )
    return loss, int((labels != _IGNORE).sum())


def _plain_logits(backbone: Backbone, state: DecodeState, ids: Tensor) -> Tensor:
    """Logits `[B, Y, V]` for the targets `[B, Y]` without a memory; the state stays as it is."""
    hidden = backbone.extend(state.reading(), backbone.embed(ids[:, :-1])) if ids.shape[1] > 1 else None
    first = state.logits[:, None]
    return first if hidden is None else torch.cat([first, backbone.logits(hidden)], 1)


def _moved(plain: Tensor, logits: Tensor, counted: Tensor) -> Tensor:
    """KL(plain || with memory) in nats, summed over the counted tokens `[B, Y]`."""
    known, found = plain[counted].log_softmax(-1), logits[counted].log_softmax(-1)
    return torch.nn.functional.kl_div(found, known, log_target=True, reduction="sum")


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
