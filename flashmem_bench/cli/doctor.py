"""`flashmem-bench doctor`: what is there, what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmem_bench.cli import options as o

_PROMPTS, _BATCH = 16, 4
_TIMED, _CONTEXT = ("vanilla", "flashmem"), 512


def doctor(
    determinism: Annotated[
        bool, typer.Option("--determinism", help="Generate twice, and at two batch sizes, and compare the tokens.")
    ] = False,
    timing: Annotated[
        bool, typer.Option("--timing", help="Time methods against themselves: can the times here be trusted?")
    ] = False,
    gold: Annotated[
        list[str] | None,
        typer.Option(
            "--gold",
            help="Grade the right answers of these suites: does each get the full score?",
            metavar="S",
            show_default=False,
        ),
    ] = None,
    limit: o.Limit = None,
    allow_code_execution: o.AllowCode = False,
    allow_uncontained_code: o.AllowUncontained = False,
    model: o.Model = "flashmem-tiny",
    device: o.Device = "auto",
    dtype: o.DType = "auto",
    results_dir: o.ResultsDir = o.DEFAULT_RESULTS,
    data_dir: o.DataDir = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> int:
    """Examine the installation; exit code 1 if something essential is broken."""
    o.set_up_logging(debug)
    if determinism:
        return _determinism(model, device, dtype, json=json)
    if gold:
        allowed = {"allow_code": allow_code_execution, "allow_uncontained": allow_uncontained_code}
        return _gold(o.known_suites(gold), data_dir, o.count(limit, "--limit"), allowed, json=json)
    if timing:
        return _timing(model, device, dtype, json=json)
    from flashmem_bench.doctor import examine

    checks = examine(results_dir, data_dir)
    broken = [check for check in checks if check.status == "broken"]
    if json:
        o.emit_json([dataclasses.asdict(check) for check in checks])
    else:
        from flashmem_bench.cli.lists import show_rows

        show_rows([{"": check.status, "check": check.name, "found": check.detail} for check in checks], json=False)
        o.tell("broken: " + ", ".join(check.name for check in broken) if broken else "nothing essential is broken")
    return 1 if broken else 0


def _determinism(model: str, device: str, dtype: str, *, json: bool) -> int:
    """Compare tokens; exit code 1 where not even the same batch gives them again."""
    from flashmem.memory import MemoryConfig, new_memory
    from flashmem_bench.determinism import measure
    from flashmem_bench.models import load_backbone
    from flashmem_bench.tasks import load_suite

    backbone = load_backbone(model, device, dtype)
    prompts = [backbone.encode_chat(sample.prompt) for sample in load_suite("wordmath").samples()[:_PROMPTS]]
    found = measure(backbone, prompts, _BATCH)
    found += measure(backbone, prompts, _BATCH, new_memory(MemoryConfig(), backbone).eval())
    if json:
        o.emit_json([dataclasses.asdict(entry) for entry in found])
    else:
        o.tell(f"{backbone.name}, {backbone.device.type}, {str(backbone.dtype).removeprefix('torch.')}")
        for entry in found:
            o.tell(_sentence(entry))
    return 1 if any(entry.same < entry.answers and "twice" in entry.what for entry in found) else 0


def _sentence(entry: Any) -> str:
    where = "" if entry.first_difference is None else f"; the earliest difference is at token {entry.first_difference}"
    return f"{entry.what}: {entry.same} of {entry.answers} answers are equal token for token{where}"


def _timing(model: str, device: str, dtype: str, *, json: bool) -> int:
    """Time two methods against themselves; exit code 1 where phases, observer or intervals are off."""
    from flashmem_bench.latency.arms import new_arm
    from flashmem_bench.latency.protocol import Protocol
    from flashmem_bench.latency.selfcheck import check_harness
    from flashmem_bench.models import load_backbone

    backbone, protocol = load_backbone(model, device, dtype), Protocol()
    found = [check_harness(backbone, new_arm(name, backbone, protocol), protocol, _CONTEXT) for name in _TIMED]
    if json:
        o.emit_json([check.plain() for check in found])
    else:
        o.tell(f"{backbone.name}, {backbone.device.type}, context {_CONTEXT}, protocol {protocol.name}")
        for check in found:
            for sentence, fine in check.findings():
                o.tell(f"{check.method}: {sentence}: {'ok' if fine else 'not ok'}")
    return 0 if all(fine for check in found for _, fine in check.findings()) else 1


def _gold(
    suites: Sequence[str], data_dir: Path | None, limit: int | None, allowed: dict[str, bool], *, json: bool
) -> int:
    """Grade the suites' own right answers; exit code 1 where one is refused."""
    from flashmem_bench.gold import grade_targets
    from flashmem_bench.grading.code import permit_code
    from flashmem_bench.suites import find_suite
    from flashmem_bench.tasks import load_suite

    for name in suites:
        permit_code(find_suite(name), *allowed.values())
    found = [grade_targets(load_suite(name, data_dir=data_dir, **allowed), limit) for name in suites]
    if json:
        o.emit_json([dataclasses.asdict(check) for check in found])
    else:
        for check in found:
            tail = f"; not {', '.join(check.refused)}" if check.refused else ""
            o.tell(f"{check.suite}: {check.right} of {check.samples} right answers get the full score{tail}")
    return 1 if any(check.refused for check in found) else 0
