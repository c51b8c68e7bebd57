"""The one place through which text reaches the terminal.

What a model wrote can be in an answer, an error's message or a traceback; a data set chooses sample ids, a suite file
its title. Raw, such text could move the cursor, change the window's title, hide what stands before it, or put a link
under an innocent word. So everything is cleaned here: control characters (C0 with ESC and the carriage return, DEL, C1)
become visible signs, marks that turn the direction of text and lone surrogates become U+FFFD; line feeds and tabs stay.
Square brackets are never taken for markup.

No other module prints, or makes a rich console.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
    from rich.segment import Segment

_KEPT = frozenset("\n\t")
_UNKNOWN = "\ufffd"
# Arabic letter mark, marks and embeddings of direction, isolates; line and paragraph separators; annotations; tags.
_UNSEEN = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), *range(0xFFF9, 0xFFFC),
           *range(0xE0000, 0xE0080))  # fmt: skip
_SIGNS: dict[int, str] = {
    # The signs of control characters have a block of their own, in the same order.
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), _UNKNOWN),
    **dict.fromkeys(_UNSEEN, _UNKNOWN),
    **dict.fromkeys(range(0xD800, 0xE000), _UNKNOWN),
}
# In JSON the same characters keep their value; those below 0x20 are escaped already.
_ESCAPES = {code: f"\\u{code:04x}" for code in _SIGNS if 0x20 <= code <= 0xFFFF}
_ESCAPES |= {code: json.dumps(chr(code))[1:-1] for code in _SIGNS if code > 0xFFFF}


def clean(text: str) -> str:
    """Return text without anything that a terminal would obey; its length in letters stays."""
    return text.translate(_SIGNS)


def tell(text: str = "") -> None:
    """Print text on stdout."""
    _write(sys.stdout, clean(text))


def say(text: str, quiet: bool = False) -> None:
    """Print a sentence on stderr."""
    if not quiet:
        _write(sys.stderr, clean(text))


def emit_json(document: Any) -> None:
    """Print one JSON document as the last line of stdout."""
    _write(sys.stdout, json.dumps(document, ensure_ascii=False, allow_nan=False).translate(_ESCAPES))


def _write(stream: Any, text: str) -> None:
    # A stream in another encoding shows what it has no letter for as a number, rather than failing.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def console(stderr: bool = False, **more: Any) -> Console:
    """Return a rich console that cleans what it shows and takes no markup.

    Args:
        stderr: Of stderr; else of stdout, where a file or pipe is as wide as a table needs.
        more: Further arguments of `rich.console.Console`.
    """
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, emoji=False, **more)
    if not stderr and not made.is_terminal:
        made = Console(markup=False, emoji=False, width=160, **more)
    # Cleaning hooks into the printing itself, so that no caller can forget it.
    hook: Any = _Cleaning()
    made.push_render_hook(hook)
    return made


class _Cleaning:
    """A `rich.console.RenderHook`, written without importing rich."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(renderable) for renderable in renderables]


class _Cleaned:
    """A renderable whose text is cleaned; what rich itself sends to steer the terminal passes."""

    def __init__(self, inner: ConsoleRenderable):
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _cleaned(console.render(self.inner, options))


def _cleaned(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        yield segment if segment.control else segment._replace(text=clean(segment.text))


class CleanFormatter(logging.Formatter):
    """Formats log records, tracebacks included, and cleans them."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return clean(super().format(record))
