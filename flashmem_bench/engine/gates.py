"""Are the answers right? Without that no figure is given.

Two questions. Do two engines give the same tokens? And would one full pass of the untouched transformers model over
prompt, memories and tokens have chosen every token that the engine chose? The second needs no rival that is as good,
and it sees the whole cache: a key in a wrong place changes a token.

Floating point adds in another order in another engine, so two logits that are as good as equal may change places. A
token that the full pass puts within the tolerance of its best one is counted as a tie, apart from the equal ones, and
the tokens behind a tie are not compared between engines: they continue another text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmem.generation import Generation

# Difference of two logits that counts as none, as a share of the largest logit.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass
class Agreement:
    """How far answers agree.

    Attributes:
        what: Who was compared with whom.
        equal: Answers, or tokens, that are the same.
        ties: Those that part at a tie.
        different: Places of those that part where there is no tie.
    """

    what: str
    unit: str = "answers"
    equal: int = 0
    ties: int = 0
    different: list[int] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether nothing differs for another reason than a tie."""
        return not self.different

    def __str__(self) -> str:
        total = self.equal + self.ties + len(self.different)
        ties = f", {self.ties} part at a tie" if self.ties else ""
        wrong = f", {len(self.different)} differ (first: {self.different[0]})" if self.different else ""
        return f"{self.what}: {self.equal} of {total} {self.unit} equal{ties}{wrong}"


def together(agreements: Sequence[Agreement], what: str) -> Agreement:
    """Add up what several answers were found to be."""
    return Agreement(
        what,
        agreements[0].unit,
        equal=sum(one.equal for one in agreements),
        ties=sum(one.ties for one in agreements),
        different=[place for one in agreements for place in one.different],
    )


def same_answers(
    clean: Any, prompts: Sequence[list[int]], a: Sequence[list[int]], b: Sequence[list[int]], what: str
) -> Agreement:
    """Compare the answers of two engines token for token; the untouched model judges where they part."""
    found = Agreement(what)
    for place, (prompt, first, second) in enumerate(zip(prompts, a, b, strict=True)):
        if first == second:
            found.equal += 1
            continue
        parted = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), None)
        if parted is None or not _tie(clean, [*prompt, *first[:parted]], first[parted], second[parted]):
            found.different.append(place)
        else:
            found.ties += 1
    return found


def _tie(clean: Any, ids: list[int], one: int, other: int) -> bool:
    import torch

    with torch.inference_mode():
        logits = clean(torch.tensor([ids], device=clean.device), logits_to_keep=1, use_cache=False).logits[0, -1]
    logits = logits.float()
    return bool((logits[one] - logits[other]).abs() <= tolerance(clean) * logits.abs().max())


def tolerance(clean: Any) -> float:
    """Return the share of the largest logit that counts as no difference in the model's dtype."""
    return TOLERANCE[str(clean.dtype).removeprefix("torch.")]


def full_pass(clean: Any, prompt: list[int], answer: Generation, what: str) -> Agreement:
    """Hold every token of an answer against one full pass of the untouched model.

    Args:
        clean: The model.
        prompt: Token ids.
        answer: With its memories where it has any (`keep_memories`), sampled greedily behind them.
        what: Whose answer it is.
    """
    import torch

    embeds, asked = _sequence(clean, prompt, answer)
    with torch.inference_mode():
        states = clean.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
        logits = clean.get_output_embeddings()(states[torch.tensor(asked, device=clean.device)]).float()
    chosen = logits[torch.arange(len(asked), device=logits.device), torch.tensor(answer.token_ids).to(logits.device)]
    gaps = ((logits.max(-1).values - chosen) / logits.abs().max(-1).values).tolist()
    bearable = tolerance(clean)
    return Agreement(
        what,
        "tokens",
        equal=sum(gap == 0 for gap in gaps),
        ties=sum(0 < gap <= bearable for gap in gaps),
        different=[place for place, gap in enumerate(gaps) if not gap <= bearable],
    )


def _sequence(clean: Any, prompt: list[int], answer: Generation) -> tuple[Any, list[int]]:
    """The input embeddings `[1, T, d]` of everything, and the positions whose logits chose each token."""
    import torch

    embed = clean.get_input_embeddings()
    memories = dict(zip([trigger.text_index for trigger in answer.triggers], answer.memories, strict=True))
    parts, length, asked = [embed(torch.tensor(prompt, device=clean.device))], len(prompt), []
    for place, token in enumerate(answer.token_ids):
        if place in memories:
            parts.append(memories[place].to(clean.device, clean.dtype))
            length += len(memories[place])
        asked.append(length - 1)
        parts.append(embed(torch.tensor([token], device=clean.device)))
        length += 1
    return torch.cat(parts)[None], asked
