"""Grading answers about a conversation as LoCoMo's own evaluation does.

Words are compared after normalising (lower case; no punctuation, articles or "and") and Porter stemming, by F1 over
the bag of words. A multi-hop answer is a list: each of its parts, separated by commas, takes the best of the answer's
parts, and the mean counts. Of an open-domain answer only what stands before a semicolon counts, since the rest is a
reason. An adversarial question, which the conversation does not answer, is graded by whether the text says so.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from flashmem_bench.grading.hooks import NO_ANSWER

_LITTLE_WORDS = re.compile(r"\b(?:a|an|the|and)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ABSTAINING = ("not mentioned", "no information available")


def locomo_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Grade an answer against `doc["gold"]` by the rule of `doc["category"]`."""
    text = "" if results[0] == NO_ANSWER else results[0]
    if doc["category"] == "adversarial":
        return {"abstained": float(abstains(text))}
    gold = doc["gold"]
    if doc["category"] == "multi-hop":
        return {"f1": list_f1(text, gold)}
    if doc["category"] == "open-domain":
        gold = gold.partition(";")[0].strip()
    return {"f1": word_f1(text, gold)}


def abstains(text: str) -> bool:
    """Return whether a text says that the conversation does not tell."""
    return any(phrase in text.lower() for phrase in _ABSTAINING)


def list_f1(answer: str, gold: str) -> float:
    """Return the mean over the gold parts of the best F1 that any part of the answer has with them."""
    ours, theirs = _parts(answer), _parts(gold)
    return sum(max(word_f1(part, wanted) for part in ours) for wanted in theirs) / len(theirs)


def word_f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over stemmed words."""
    ours, theirs = stems(answer), stems(gold)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if not shared:
        return 0.0
    return 2 * shared / (len(ours) + len(theirs))


def stems(text: str) -> list[str]:
    """Return the stems of the words of a text that count."""
    bare = text.replace(",", "").lower().translate(_PUNCTUATION)
    return [_stem(word) for word in _LITTLE_WORDS.sub(" ", bare).split()]


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


@lru_cache(maxsize=65536)
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    from nltk.stem import PorterStemmer

    return PorterStemmer()
