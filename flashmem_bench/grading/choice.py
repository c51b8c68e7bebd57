"""Which option a completion chooses, where the options are named by letters.

A letter counts where the text says that it is the answer, not wherever it occurs: "A" is also a word. The places, in
the order in which they are believed: a box; "answer is (B)", "Answer: B"; a text that begins with the letter alone,
such as "B", "(B)" or "B. because"; the last letter in brackets. Within one kind the last occurrence counts, since
models correct themselves, except at the beginning. The options' texts are not searched for: a model that repeats an
option without its letter has not answered in the form that was asked for.

Version 1 of this extraction; the number in a suite file's `grader` goes up when a grade can change.
"""

from __future__ import annotations

import re

from flashmem_bench.grading.extract import boxed

# A letter may be dressed, as in **B**, [B], "B" or \text{B}.
_OPEN, _CLOSE = r"[\s*_\"'`$({\[]*(?:\\text\w*\{)?", r"[)\]}*_\"'`$]*"
_CALLED = r"\banswer(?:\s+is|\s*:|\s+should\s+be|\s+would\s+be)[\s:]*(?:option\b|choice\b|letter\b)?"
# A small letter within a sentence may be the article, so it must stand in brackets or end a clause.
_SAID = rf"(?i:{_CALLED})(?:{_OPEN}([LETTERS])(?![A-Za-z0-9'’])|{_OPEN}([letters])(?=[)\]}}.,;:*]|\s*$))"
_ALONE = r"(?i:option\b|choice\b)?[\s*_\"'`$]*([LETTERSletters])(?:[*_\"'`$]*(?:\s*$|[.:,)\n]|\s+-\s))"
_DRESSED = rf"{_OPEN}([LETTERSletters]){_CLOSE}\.?"
_IN_BRACKETS = r"\(([LETTERS])\)"


def said_letter(text: str, letters: str) -> str | None:
    """Return the letter that the text calls its answer, or that stands in its last box.

    Args:
        text: The completion.
        letters: The letters of the options, such as `ABCD`.
    """
    box = boxed(text)
    inside = re.fullmatch(_for(_DRESSED, letters), box) if box else None
    if inside:
        return inside.group(1).upper()
    found = re.findall(_for(_SAID, letters), text, re.MULTILINE)
    return "".join(found[-1]).upper() if found else None


def choice_letter(text: str, letters: str) -> str | None:
    """Return the letter that the text chooses, in any of the forms that this module's first paragraph lists."""
    said = said_letter(text, letters)
    if said:
        return said
    whole = re.fullmatch(_for(_DRESSED, letters), text.strip()) or re.match(_for(_ALONE, letters), text.lstrip())
    if whole:
        return whole.group(1).upper()
    bracketed = re.findall(_for(_IN_BRACKETS, letters), text)
    return bracketed[-1] if bracketed else None


def _for(pattern: str, letters: str) -> str:
    return pattern.replace("LETTERS", letters.upper()).replace("letters", letters.lower())
