"""The templates of suite files: they see their row and nothing else, change nothing, and come to an end.

Jinja's sandbox keeps a template from Python's inside, and the immutable one from changing the row. Neither bounds time
or memory: nested loops run for years, and a string doubled sixty times fits nowhere. So each rendering has a deadline,
by an alarm of the operating system where it runs in the main thread, and may take so much more memory and no more,
where the system can be told (Linux). The bounds are far beyond what any honest prompt needs.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType
from typing import Any

from jinja2 import BaseLoader, StrictUndefined, Template, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

DEADLINE_S = 20.0
MEMORY_BYTES = 2 * 2**30
# Arithmetic on numbers of more bits is one instruction that no alarm interrupts.
_MOST_BITS = 2**16


class TemplateLimitError(TemplateRuntimeError):
    """A template took too long, or wanted too much memory."""


class _BoundedTemplate(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        """See `jinja2.Template.render`."""
        with _bounded():
            return super().render(*args, **kwargs)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which every template of a suite is rendered; it compiles each once."""

    template_class = _BoundedTemplate
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)

    @lru_cache(maxsize=256)  # noqa: B019 - there is one sandbox and it lives as long as the process
    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        """See `jinja2.Environment.from_string`."""
        # What is constant in a template is worked out here.
        with _bounded():
            return super().from_string(source, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply or raise to a power, within bounds."""
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * max(1, abs(right)) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > _MOST_BITS:
                raise TemplateLimitError(f"a number of more than {_MOST_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    try:
        with _deadline(), _memory():
            yield
    except MemoryError:
        raise TemplateLimitError(f"it wanted more than {MEMORY_BYTES // 2**30} GiB of memory") from None
    except RecursionError:
        raise TemplateLimitError("it calls itself without end") from None


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Raise `TemplateLimitError` in the main thread after the deadline; another thread has none."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TemplateLimitError(f"it took longer than {DEADLINE_S:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _memory() -> Iterator[None]:
    """Let this process grow by so much and no more, where the system has a limit for that."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError, ValueError):
        yield
        return
    wanted = size + MEMORY_BYTES
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
