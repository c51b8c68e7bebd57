"""Rows that our generators write: no download, no licence, any number and length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmem_bench.data import Doc, Splits
from flashmem_bench.errors import UsageError


def generated(
    *,
    flashmem: Mapping[str, Any],
    sizes: Mapping[str, int],
    generator: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    **_: Any,
) -> Splits:
    """Rows from the generator named like the suite.

    Args:
        flashmem: The suite's `metadata.flashmem`; `alias` names the generator.
        sizes: Rows of each split.
        generator: The generator's settings, such as `pairs` of `recall`, from the suite file.
        training: Settings of the training split alone, where it should be easier or more varied than the others. A list
            makes lessons: equal parts of the split, whose rows say in `lesson` which one they belong to.
        settings: More of them, which win.
        seed: Seed of the generator's streams.
    """
    name = flashmem["alias"]
    chosen = {**(generator or {}), **(settings or {})}
    lessons = [training or {}] if training is None or isinstance(training, Mapping) else training

    def rows(split: str, count: int, wanted: Mapping[str, Any]) -> list[Doc]:
        from flashmem_bench.generators import generate

        try:
            found = generate(name, split, count, seed, **wanted)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the generator of {name} refuses {wanted or 'its settings'}: {error}") from error
        return [{**row, "gold": row["answer"]} for row in found]

    def split_rows(split: str) -> list[Doc]:
        if split != "train":
            return rows(split, sizes[split], chosen)
        parts = [rows(split, sizes[split] // len(lessons), {**lesson, **chosen}) for lesson in lessons]
        if len(parts) == 1:
            return parts[0]
        return [{**row, "id": f"{row['id']}-{i}", "lesson": i} for i, part in enumerate(parts) for row in part]

    return Splits(name, {split: _later(split_rows, split) for split in sizes})


def _later(function: Callable[[str], list[Doc]], argument: str) -> Callable[[], list[Doc]]:
    return lambda: function(argument)
