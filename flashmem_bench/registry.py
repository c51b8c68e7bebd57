"""Method names and where their code is, without importing that code.

The registry holds module paths, never instances: listing methods costs a few small imports and no torch. A package
outside this one adds a method through the entry-point group `flashmem_bench.methods`, whose entries point at a
`MethodSpec` (or at a module with a `SPEC`). A name that is already taken here cannot be replaced from outside.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flashmem_bench.errors import BenchError, UnknownNameError

if TYPE_CHECKING:
    from flashmem_bench.methods.base import MethodSpec

ENTRY_POINTS = "flashmem_bench.methods"

# In the order in which tables show them.
_BUILT_IN = (
    "vanilla",
    "flashmem",
    "flashmem-literal",
    "flashmem-watch",
    "flashmem-prompt-end",
    "flashmem-no-monitor",
    "flashmem-fixed-trigger",
    "flashmem-random-trigger",
    "flashmem-output-entropy",
    "flashmem-matched-fixed",
    "flashmem-matched-output",
    "flashmem-separate-encoder",
    "flashmem-plus",
    "flashmem-random-memory",
    "flashmem-shuffled-memory",
    "flashmem-mean-memory",
    "flashmem-noop-memory",
    "memgen",
    "memgen-cached",
    "memgen-noop-memory",
    "lora-sft",
    "prompt-tuning",
    "cot-sc",
    "snapkv",
    "streaming-llm",
    "tova",
    "h2o",
)
METHODS: dict[str, str] = {name: f"flashmem_bench.methods.{name.replace('-', '_')}:SPEC" for name in _BUILT_IN}


def method_paths() -> dict[str, str]:
    """Return method name -> `module:attribute`, built-in ones first, then those of installed plugins."""
    from importlib.metadata import entry_points

    plugins = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return {**METHODS, **{name: path for name, path in sorted(plugins.items()) if name not in METHODS}}


def method_names() -> list[str]:
    """Return every method name, in the order of the tables."""
    return list(method_paths())


def get_method(name: str) -> MethodSpec:
    """Return the spec of a method.

    Raises:
        UnknownNameError: No method has that name; the message has the near misses.
        BenchError: A plugin's entry point does not lead to a spec.
    """
    from flashmem_bench.methods.base import MethodSpec

    paths = method_paths()
    if name not in paths:
        raise UnknownNameError("method", name, paths)
    module, _, attribute = paths[name].partition(":")
    try:
        spec = getattr(importlib.import_module(module), attribute or "SPEC")
    except (ImportError, AttributeError) as error:
        raise BenchError(f"the plugin of method {name} cannot be loaded from {paths[name]} ({error})") from error
    if not isinstance(spec, MethodSpec):
        raise BenchError(f"{paths[name]} is a {type(spec).__name__}, not a MethodSpec; method {name} cannot be used")
    return spec


def get_methods(names: Iterable[str]) -> list[MethodSpec]:
    """Return the specs of several methods, each once, in the order asked for."""
    return [get_method(name) for name in dict.fromkeys(names)]
