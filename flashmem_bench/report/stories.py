"""A page for each traced sample: what its memories looked at, what they say and what they changed.

`flashmem-bench run --trace` leaves one document a sample beside its row; here each becomes one self-contained page in
`stories/`, linked from the report. A page loads nothing and holds no script: shading by latent is done with radio
buttons and style rules. Every text that a model or a data set wrote goes through Jinja's escaping.

The views of one memory are made in `story_views`, the coordinates of the drawings in `story_charts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, TemplateError

from flashmem_bench.errors import StoreError
from flashmem_bench.places import file_stem
from flashmem_bench.report import wording as say
from flashmem_bench.report.cells import Cell
from flashmem_bench.report.pages import page_environment
from flashmem_bench.report.story_charts import entropy_panels, shown, watched_entropy
from flashmem_bench.report.story_views import MOST_TABS, memory_view, summary_parts
from flashmem_bench.tracing import read_traces

Context = dict[str, Any]

# Marks of the families whose templates are not written as <|name|>.
_TURNS = frozenset({"<s>", "</s>", "<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"})


@dataclass(frozen=True)
class Story:
    """One page.

    Attributes:
        path: Where it lies.
        href: The same, relative to the report.
        memories: Injections of the sample.
        score: The sample's score, None without one.
    """

    suite: str
    method: str
    sample_id: str
    path: Path
    href: str
    memories: int
    score: float | None


def write_stories(cells: Sequence[Cell], root: Path) -> list[Story]:
    """Write the page of every traced sample of the cells into `root/stories`, replacing older ones."""
    template, stories, used = _environment().get_template("story.html.j2"), [], set()
    for cell in cells:
        for trace in read_traces(cell.store.path):
            row = cell.by_sample.get(trace["sample_id"])
            if row is None:
                continue
            name = _file_name(cell, trace["sample_id"], used)
            path = root / "stories" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".html.tmp")
            temporary.write_text(_page(template, trace, row, cell), encoding="utf-8")
            temporary.replace(path)
            count, score = len(trace["injections"]), row.get("score")
            stories.append(Story(cell.suite, cell.method, trace["sample_id"], path, f"stories/{name}", count, score))
    return stories


def _page(template: Template, trace: Context, row: Context, cell: Cell) -> str:
    try:
        return template.render(story_context(trace, row, cell))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError) as error:
        raise StoreError(
            f"the trace of sample {trace['sample_id']} in {cell.store.path / 'traces'} is broken "
            f"({type(error).__name__}); delete it, and make it again with run --trace"
        ) from error


def story_context(trace: Context, row: Context, cell: Cell) -> Context:
    """Everything that the template shows of one sample."""
    memories = [memory_view(trace, number) for number in range(len(trace["injections"]))]
    return {
        "suite": cell.suite,
        "method": cell.method,
        "model": trace["model"],
        "sample": trace["sample_id"],
        "cell": cell.cell_id,
        "facts": _facts(trace, row),
        "gold": trace["gold"],
        "summaries": [summary_parts(trace, number) for number in range(len(trace["injections"]))],
        "prompt": [{"text": piece, "special": _special(piece)} for piece in trace["prompt"]],
        "answer": _answer(trace),
        "watched": watched_entropy(trace),
        "panels": entropy_panels(trace),
        "tau": trace["tau"],
        "memories": memories,
        "tabs": min(MOST_TABS, max((memory["latents"] for memory in memories), default=0)),
        "literal": trace["sampling_logits"] == "pre",
        "sinks": trace["sinks"],
        "monitor_layer": trace["monitor_layer"],
    }


def _environment() -> Environment:
    environment = page_environment()
    environment.filters["shown"] = shown
    return environment


def _file_name(cell: Cell, sample_id: str, used: set[str]) -> str:
    """A plain file name that no other story has; cells of other settings add their id."""
    plain = file_stem(cell.suite, cell.method, sample_id)
    name = plain if plain not in used else f"{plain}-{cell.cell_id[:8]}"
    used.add(name)
    return f"{name}.html"


def _facts(trace: Context, row: Context) -> list[tuple[str, str]]:
    """The line of figures under the title."""
    score = row.get("score")
    injected = trace["injections"]
    facts = [
        ("score", say.DASH if score is None else f"{score:.3g}"),
        ("memories", f"{len(injected)} of {injected[0]['latents']} latents" if injected else "none"),
        ("trigger", trace["trigger"]),
    ]
    if trace["tau"] is not None:
        above = sum(bool(step["above_tau"]) for step in trace["steps"])
        facts += [
            ("tau", f"{say.number(trace['tau'], 4)} nats"),
            ("above tau", f"{above} of {len(trace['steps'])} steps"),
        ]
    facts += [
        ("prompt", f"{len(trace['prompt'])} tokens"),
        ("answer", f"{len(trace['answer'])} tokens, ended by {trace['finish_reason']}"),
    ]
    return facts


def _answer(trace: Context) -> list[Context]:
    """The answer token by token: its shade, what to say on hover, and the memories before it."""
    watched, steps = watched_entropy(trace), trace["steps"]
    top = max((step[watched] for step in steps), default=0.0) or 1.0
    before: dict[int, list[int]] = {}
    for number, injection in enumerate(trace["injections"], start=1):
        before.setdefault(injection["text_index"], []).append(number)
    tokens = []
    for index, (piece, step) in enumerate(zip(trace["answer"], steps, strict=False)):
        above = {None: "", True: "; above tau", False: "; not above tau"}[step["above_tau"]]
        tokens.append(
            {
                "text": piece,
                "special": _special(piece),
                "shade": f"{0.75 * step[watched] / top:.2f}",
                "memories": before.get(index, []),
                "hover": f"step {index}: attention entropy {say.number(step['entropy'])}, output entropy "
                f"{say.number(step['output_entropy'])} nats{above}",
            }
        )
    return tokens


def _special(piece: str) -> bool:
    return (piece.startswith("<|") and piece.endswith("|>")) or piece in _TURNS
