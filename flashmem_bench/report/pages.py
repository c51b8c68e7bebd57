"""How pages are rendered: texts of models and data sets are escaped and hold nothing that turns or hides text."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flashmem_bench.terminal import clean


def page_environment() -> Environment:
    """Return the environment of the page templates."""
    return Environment(
        loader=PackageLoader("flashmem_bench.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plain(value: Any) -> Any:
    """Control characters and marks of direction are shown as signs: HTML has no way to write them as they are."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
