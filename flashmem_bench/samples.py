"""The records that pass between a suite and the loop that runs it: a question, its grade, how to generate.

Plain data without lm-eval, so that a method or a test can make them by hand.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: The complete user message.
        target: The complete assistant message that training uses.
        answer: The short right answer.
        stratum: The group that the sample is reported and, if the suite says so, calibrated with.
        cluster: What it shares with other samples, such as a document; None where it stands alone.
        session_id: The session that it belongs to: samples that ask about one history, one after the other.
        prefix: The text of that history, with which the prompt begins.
        moments: Texts of the target after which a memory is wanted; empty where that is not known.
        choices: The given answers whose likelihoods are compared; empty where an answer is generated.
        contexts: The user message of each choice, where the choices differ in what precedes one ending.
    """

    sample_id: str
    prompt: str
    target: str
    answer: str
    stratum: str | None
    doc: dict[str, Any]
    moments: tuple[str, ...] = ()
    cluster: str | None = None
    session_id: str | None = None
    prefix: str | None = None
    choices: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grade:
    """What a completion is worth: `score` is the primary metric, `metrics` has them all by name.

    Attributes:
        counts: False where the grader could not decide in time: the score is then no score and belongs in no mean.
    """

    score: float
    parse_status: Literal["ok", "no_answer", "timeout", "error"]
    metrics: dict[str, float]
    extracted: str | None
    counts: bool = True


@dataclass(frozen=True)
class GenerationArgs:
    """How the suite wants completions generated; temperature 0 is greedy."""

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Likelihoods:
    """What stands in the place of a completion where given answers are judged.

    Attributes:
        values: Log-likelihood of each request of a sample, in nats, in the suite's order.
        greedy: Whether each is what greedy decoding would have written.
    """

    values: tuple[float, ...]
    greedy: tuple[bool, ...]

    def to_text(self) -> str:
        """Return one line that `from_text` reads back without loss, so that stored texts can be graded again."""
        return json.dumps({"log_likelihoods": self.values, "greedy": self.greedy})

    @classmethod
    def from_text(cls, text: str) -> Likelihoods:
        """Read what `to_text` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            found = json.loads(text)
            return cls(tuple(map(float, found["log_likelihoods"])), tuple(map(bool, found["greedy"])))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a line of log-likelihoods: {text[:60]!r}") from error


def sample_seed(seed: int, sample_id: str) -> int:
    """Return a seed that depends on the sample and not on what ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()[:6], "big")
