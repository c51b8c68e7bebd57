"""Given answers judged instead of generated: any method that can `score`, in the place of one that generates.

`ScoringMethod` stands where the runner expects a method. Each sample's contexts go through the backbone once, the
method writes its memory at their ends if its trigger says so, and what comes back is the likelihood of every request,
written as one line in the record's `text`: it is stored, graded and graded again as a completion would be.

Tokens are lm-eval's: context and continuation are encoded together and cut behind the context's own tokens, and white
space at the end of a context belongs to the continuation. Chat templates end in such white space. It stays in the
prompt here, so that the memory stands where it was trained, behind all of it, and its probability is added to that of
the continuation: without a memory the numbers are those of lm-eval's own model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flashmem_bench.errors import UsageError
from flashmem_bench.samples import Likelihoods

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.generation import Generation
    from flashmem.scoring import Scores
    from flashmem_bench.clock import HostClock
    from flashmem_bench.methods.base import Method
    from flashmem_bench.prepare import Prepared
    from flashmem_bench.samples import Sample
    from flashmem_bench.tasks import Suite

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Encoded:
    """One context and the continuations behind it, as tokens.

    Attributes:
        prompt: Token ids of the context; the memory comes behind them.
        continuations: Token ids of each continuation.
        tail: So many last tokens of the prompt belong to every continuation.
        dropped: So many tokens at the end of the context's own encoding are not in the prompt, because they merge
            with the continuation.
    """

    prompt: list[int]
    continuations: list[list[int]]
    tail: int = 0
    dropped: int = 0


def answering(method: Method, suite: Suite) -> Method:
    """Return what answers the samples of a suite: the method itself, or its judgement of given answers.

    Raises:
        UsageError: The method cannot judge given answers.
    """
    return ScoringMethod(method, suite) if suite.given_answers else method


def cannot_score(method: str, suite: str) -> UsageError:
    """Return the error of a method that only makes sense while text is generated."""
    return UsageError(
        f"{method} cannot judge given answers, which is what {suite} asks for: run it on a suite whose answers are "
        "generated, or choose another method for this one"
    )


def room_for(prepared: Prepared, sample: Sample, truncate: str | None) -> int:
    """Return how many tokens must fit behind a prompt that may be cut: the answer's budget, or the longest choice."""
    if truncate is None or not prepared.suite.given_answers:
        return int(prepared.context.generation["max_new_tokens"])
    encode, context_of = encoder(prepared.context.backbone)
    pairs = prepared.suite.requests(sample, templated=_templated(prepared.context.backbone))
    groups = _by_context(pairs).items()
    encoded = [encode_pairs(encode, context_of(message), texts) for message, texts in groups if message]
    return max((len(tokens) for entry in encoded for tokens in entry.continuations), default=1)


class ScoringMethod:
    """Judges given answers with a method; see `Method`."""

    def __init__(self, method: Any, suite: Suite):
        if not hasattr(method, "score"):
            raise cannot_score(type(method).__name__, suite.name)
        self.method, self.suite = method, suite
        self.backbone: Backbone = method.backbone

    def batch_key(self, sample: Sample) -> object:
        """Return the sample: its choices are a batch of their own."""
        return sample.sample_id

    def warm_up(self, prompt: list[int], sample: Sample) -> None:
        """Judge one sample."""
        self.generate([prompt], [sample], None, 0)

    def generate(
        self, prompts: Sequence[list[int]], samples: Sequence[Sample], clock: HostClock | None, seed: int
    ) -> list[Generation]:
        """Judge one sample after the other; nothing is random."""
        return [self._judge(p, s, clock) for p, s in zip(prompts, samples, strict=True)]

    def _judge(self, prompt: list[int], sample: Sample, clock: HostClock | None) -> Generation:
        pairs = self.suite.requests(sample, templated=_templated(self.backbone))
        encode, context_of = encoder(self.backbone)
        found: dict[tuple[str, str], tuple[float, bool]] = {}
        records = []
        for message, texts in _by_context(pairs).items():
            if message:
                encoded = encode_pairs(encode, context_of(message), texts)
                if message == sample.prompt:
                    encoded = _cut(encoded, prompt, encode(context_of(message)))
            else:
                encoded = without_context(self.backbone, texts)
            scores = judge(self.method, encoded, sample, clock, plain=not message)
            records.append(scores.generation)
            judged = zip(scores.log_likelihoods, scores.greedy, strict=True)
            found.update(zip(((message, text) for text in texts), judged, strict=True))
        values, greedy = zip(*(found[pair] for pair in pairs), strict=True)
        return replace(joined(records), text=Likelihoods(values, greedy).to_text())


def judge(method: Any, encoded: Encoded, sample: Sample, clock: Any = None, *, plain: bool = False) -> Scores:
    """Score the continuations of one context with a method; `plain` keeps its memory out."""
    return method.score(encoded.prompt, encoded.continuations, sample, clock, tail=encoded.tail, plain=plain)


def encode_pairs(encode: Encode, context: str, continuations: Sequence[str]) -> Encoded:
    """Encode continuations together with the context that they follow, as lm-eval does.

    Args:
        encode: Text to token ids, with the special tokens that a prompt gets.
        context: The whole text before the continuations, not empty.
        continuations: Texts.
    """
    bare = context.rstrip()
    known, full = encode(bare), encode(context)
    sequences = [known + encode(context + text)[len(known) :] for text in continuations]
    if all(len(tokens) > len(full) and tokens[: len(full)] == full for tokens in sequences):
        return Encoded(full, [tokens[len(full) :] for tokens in sequences], tail=len(full) - len(known))
    dropped = max(0, len(full) - len(known))
    return Encoded(known, [tokens[len(known) :] for tokens in sequences], dropped=dropped)


def without_context(backbone: Backbone, continuations: Sequence[str]) -> Encoded:
    """Encode continuations that follow nothing: the token that begins or ends a text stands before them."""
    first = backbone.tokenizer.bos_token_id
    start = backbone.tokenizer.eos_token_id if first is None else first
    return Encoded([start], [backbone.encode(text) for text in continuations])


def encoder(backbone: Backbone) -> tuple[Encode, Callable[[str], str]]:
    """Return how a backbone's prompts become tokens, and what stands around a user message."""
    tokenizer = backbone.tokenizer
    if not _templated(backbone):
        return tokenizer.encode, lambda message: message

    def around(message: str) -> str:
        turns = [{"role": "user", "content": message}]
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    return backbone.encode, around


def joined(records: Sequence[Generation]) -> Generation:
    """Return one record of all contexts of a sample: the first one's, with what the others cost and did."""
    if len(records) == 1:
        return records[0]
    watched = [record.above_threshold for record in records if record.above_threshold is not None]
    return replace(
        records[0],
        positions_encoded=sum(record.positions_encoded for record in records),
        positions_woven=sum(record.positions_woven for record in records),
        positions_evicted=sum(record.positions_evicted for record in records),
        triggers=[trigger for record in records for trigger in record.triggers],
        entropies=[value for record in records for value in record.entropies],
        output_entropies=[value for record in records for value in record.output_entropies],
        above_threshold=sum(watched) if watched else None,
    )


def _by_context(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for message, text in pairs:
        groups.setdefault(message, []).append(text)
    return groups


def _cut(encoded: Encoded, prompt: list[int], full: list[int]) -> Encoded:
    """Put the prompt as the runner cut it into the place of the whole one."""
    if prompt == full:
        return encoded
    return replace(encoded, prompt=prompt[: len(prompt) - encoded.dropped])


def _templated(backbone: Backbone) -> bool:
    return bool(backbone.tokenizer.chat_template)
