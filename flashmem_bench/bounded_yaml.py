"""YAML from files that nobody vouches for: safe, and bounded before anything is built.

Safe loading keeps a file from running code; it does not keep a short one from becoming gigabytes, since aliases may be
nested ("billion laughs"). So a file's events are read first, which builds nothing: its size, its depth and its number
of values with all aliases written out are bounded, a value that holds itself is refused, and so is a key that comes
twice, of which YAML would silently keep the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**20
MOST_DEPTH = 64
MOST_VALUES = 100_000


@dataclass
class _Open:
    """A collection whose end has not come yet."""

    anchor: str | None
    mapping: bool
    values: int = 1
    depth: int = 1
    entries: int = 0
    keys: set[str] = field(default_factory=set)


def read_bounded(path: Path) -> bytes:
    """Return the content of a file that is not too large.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too large.
    """
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 2**20} MiB")
    return content


def load_bounded(content: bytes, loader: Any, *, keys_once: bool = True) -> Any:
    """Return what YAML says, built by a safe loader.

    Args:
        content: The file.
        loader: A subclass of a safe loader.
        keys_once: Refuse a key that comes twice in one mapping.

    Raises:
        ValueError: It is not YAML, beyond a bound, or holds a value that cannot be; the message is a clause.
    """
    try:
        check_events(yaml.parse(content, Loader=loader), keys_once)
        return yaml.load(content, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def check_events(events: Iterator[Any], keys_once: bool = True) -> None:
    """Go through the events of a document and refuse what is beyond a bound.

    Raises:
        ValueError: With what is wrong and where.
        yaml.YAMLError: It is not YAML.
    """
    sizes: dict[str, tuple[int, int]] = {}
    above: list[_Open] = []
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            above.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            _bound(len(above), 0, event)
        elif isinstance(event, yaml.CollectionEndEvent):
            done = above.pop()
            _take(above, sizes, done.anchor, (done.values, done.depth), event, key=None)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(entry.anchor == event.anchor for entry in above):
                raise ValueError(f"*{event.anchor} holds itself{_where(event)}")
            _take(above, sizes, None, sizes.get(event.anchor, (1, 1)), event, key=None)
        elif isinstance(event, yaml.ScalarEvent):
            _take(above, sizes, event.anchor, (1, 0), event, key=event.value if keys_once else None)


def _take(
    above: list[_Open],
    sizes: dict[str, tuple[int, int]],
    anchor: str | None,
    size: tuple[int, int],
    event: Any,
    key: str | None,
) -> None:
    """Count a value that is complete into the collection that holds it."""
    values, depth = size
    if anchor is not None:
        sizes[anchor] = size
    if not above:
        return
    holder = above[-1]
    if holder.mapping and holder.entries % 2 == 0 and key is not None and key != "<<":
        if key in holder.keys:
            raise ValueError(f"the key {key!r} comes twice{_where(event)}")
        holder.keys.add(key)
    holder.entries += 1
    holder.values += values
    holder.depth = max(holder.depth, depth + 1)
    _bound(len(above) + depth, sum(entry.values for entry in above), event)


def _bound(depth: int, values: int, event: Any) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep{_where(event)}")
    if values > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES:,} values, aliases written out{_where(event)}")


def _where(event: Any) -> str:
    return f" (line {event.start_mark.line + 1})"
