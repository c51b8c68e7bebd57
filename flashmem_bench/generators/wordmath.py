"""Multi-step word problems of one to four steps, solved by one short equation a line and a final "#### n".

A problem is a chain: an amount, then changes to it (buy, find, give away, lose, times as many, share
equally), or boxes that hold the same number each as its first step. Every division is exact, every amount
stays between 1 and 99, and the amount asked for is always the last one reached, so the equations in order are
the whole reasoning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from flashmem_bench.generators.base import NAMES, Row, make_rows

SUITE = "wordmath"
ITEMS = "apples books cards coins cups eggs keys pens shells stamps stones toys".split()
BOXES = "bags boxes jars".split()
_GAINS = ("{who} buys {y} more.", "{who} finds {y} more.", "{other} gives {who} {y} more.")
_LOSSES = ("{who} gives {y} to {other}.", "{who} loses {y}.", "{who} sells {y}.")
_LARGEST = 60


@dataclass
class _Problem:
    """A problem under construction: who holds how many, and what has been said and reckoned so far."""

    who: str
    item: str
    amount: int
    said: list[str] = field(default_factory=list)
    reckoned: list[str] = field(default_factory=list)
    each: bool = False

    def step(self, sentence: str, sign: str, y: int, result: int) -> None:
        self.said.append(sentence)
        self.reckoned.append(f"{self.amount} {sign} {y} = {result}")
        self.amount = result


def _open(rng: random.Random, boxes: bool) -> _Problem:
    """The first sentence; with `boxes` it already holds one multiplication."""
    who, item = rng.choice(NAMES), rng.choice(ITEMS)
    if not boxes:
        problem = _Problem(who, item, rng.randint(2, 12))
        problem.said.append(f"{who} has {problem.amount} {item}.")
        return problem
    problem = _Problem(who, item, rng.randint(2, 6))
    y = rng.randint(2, 6)
    sentence = f"{who} has {problem.amount} {rng.choice(BOXES)} with {y} {item} each."
    problem.step(sentence, "*", y, problem.amount * y)
    return problem


def _possible(amount: int, last: bool) -> list[str]:
    """Changes that keep the amount a whole number within bounds; sharing ends a story, so it only comes
    last.
    """
    kinds = []
    if amount <= _LARGEST - 2:
        kinds.append("gain")
    if amount >= 3:
        kinds.append("loss")
    if 2 <= amount <= 12:
        kinds.append("times")
    if last and any(amount % y == 0 for y in range(2, 7)):
        kinds.append("share")
    return kinds


def _change(rng: random.Random, problem: _Problem, last: bool) -> None:
    """Append one change to the story."""
    kind = rng.choice(_possible(problem.amount, last))
    amount, who = problem.amount, problem.who
    other = rng.choice([name for name in NAMES if name != who])
    if kind == "gain":
        y = rng.randint(2, min(12, _LARGEST - amount))
        problem.step(rng.choice(_GAINS).format(who=who, other=other, y=y), "+", y, amount + y)
    elif kind == "loss":
        y = rng.randint(2, min(12, amount - 1))
        problem.step(rng.choice(_LOSSES).format(who=who, other=other, y=y), "-", y, amount - y)
    elif kind == "times":
        y = rng.randint(2, min(5, _LARGEST // amount))
        problem.step(f"{other} has {y} times as many as {who}.", "*", y, amount * y)
        problem.who = other
    else:
        y = rng.choice([y for y in range(2, 7) if amount % y == 0])
        problem.step(f"{who} shares them equally among {y} friends.", "/", y, amount // y)
        problem.each = True


def draw(rng: random.Random, index: int, *, steps: tuple[int, ...] = (1, 2, 3, 4)) -> Row:
    """One row; `steps` are the step counts that the rows take in turn.

    Raises:
        ValueError: a step count below one.
    """
    if not steps or min(steps) < 1:
        raise ValueError(f"wordmath: steps must be at least 1, got {steps}")
    count = steps[index % len(steps)]
    problem = _open(rng, boxes=rng.random() < 0.3)
    while len(problem.reckoned) < count:
        _change(rng, problem, last=len(problem.reckoned) == count - 1)
    asked = "each friend get" if problem.each else f"{problem.who} have"
    question = f"How many {problem.item} does {asked}?"
    answer = str(problem.amount)
    return {
        "prompt": " ".join([*problem.said, question]),
        "target": "\n".join([*problem.reckoned, f"#### {answer}"]),
        "answer": answer,
        "stratum": f"steps={count}",
        "steps": count,
    }


def rows(split: str, n: int, seed: int = 0, **settings: Any) -> list[Row]:
    """The first `n` rows of `split` (train, validation, calibration or test)."""
    return make_rows(SUITE, draw, split, n, seed, settings)
