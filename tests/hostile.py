"""Text that a model or a data set could write to harm whoever looks at it, and ways to see whether it got through."""

from __future__ import annotations

ESC, BEL, CSI = "\x1b", "\x07", "\x9b"
# Clears the screen, sets the window's title, puts a link under a word, turns the text round, overwrites the line.
TERMINAL = (
    f"{ESC}[2J{ESC}]0;owned{BEL}{ESC}]8;;http://evil.example{ESC}\\click{ESC}]8;;{ESC}\\ {CSI}31m"
    "\u202eesrever\u2066 \u2028 \x7f \x08\x08 over\rwritten"
)
MARKUP = "[red]loud[/red] [link=http://evil.example]here[/link] [/] :warning:"
PAGE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)></style></title>]]>&lt; {{7*7}}"
FORMULA = '=HYPERLINK("http://evil.example","click")'
TEXTS = (TERMINAL, MARKUP, PAGE, FORMULA, TERMINAL + MARKUP + PAGE)

_OBEYED = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\n", "\t"}
_OBEYED |= set("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def obeyed(text: str) -> set[str]:
    """What a terminal would act upon."""
    return {letter for letter in text if letter in _OBEYED or 0xD800 <= ord(letter) < 0xE000}
