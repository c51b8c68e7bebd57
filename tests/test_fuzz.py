"""Garbage in files and on the command line: one sentence and the right exit code, whatever it is.

Bounded and the same in every run. A sentence that begins with "unexpected" is what is printed where nobody thought of
a case, so it counts as a failure here.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flashmem.errors import FlashMemError
from flashmem_bench.cli import run as command
from flashmem_bench.tasks import load_suite
from tests.synthetic_results import make_results
from tests.test_own_suite import YAML
from tests.test_story import made_trace
from tests.test_suites import babi_row, gsm8k_row

CODES = {0, 1, 2, 3, 130}
ROOT = Path(__file__).parent.parent


def bounded(examples: int) -> Any:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    # What fails is shown as it was found: making it smaller would take as long as it likes.
    phases = (Phase.explicit, Phase.generate)
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=quiet,
    )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.just(10**400)
    | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a part cut off, turned over, doubled or replaced."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    garbage = st.binary(max_size=20) | st.sampled_from(
        [b"\x00" * 8, b"\n\n", b"\xef\xbb\xbf", b"\r\n", b'"', b"{", b"9" * 5000]
    )
    how = draw(st.sampled_from(["cut", "replace", "drop", "double", "all"]))
    if how == "cut":
        return content[:start]
    if how == "double":
        return content + content[start:]
    if how == "all":
        return draw(garbage)
    return content[:start] + (draw(garbage) if how == "replace" else b"") + content[end:]


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value with another one somewhere in it, or without a part of it."""
    document = copy.deepcopy(document)
    holder: Any = {"": document}
    key: Any = ""
    inner = document
    while isinstance(inner, dict | list) and inner and draw(st.integers(0, 3)):
        holder = inner
        key = draw(st.sampled_from(sorted(inner))) if isinstance(inner, dict) else draw(st.integers(0, len(inner) - 1))
        inner = inner[key]
    if holder is not document and not isinstance(holder, dict | list):
        return draw(JSON)
    if draw(st.booleans()) and key != "":
        del holder[key]
    else:
        holder[key] = draw(JSON)
    return document if "" not in holder or key != "" else holder[""]


# Suites


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.delenv("FLASHMEM_DATA", raising=False)
        # A data set of no name is whatever lies in the working directory.
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


def loads_or_says_why(name: str, **more: Any) -> None:
    """A suite is loaded, rendered and grades; or the error is a sentence of this project."""
    try:
        suite = load_suite(name, **more)
        for split in ("test", "calibration"):
            samples = suite.samples(split)
            for index in range(min(3, len(samples))):
                suite.grade(samples[index], "#### 7")
    except FlashMemError as error:
        assert str(error).strip() and error.exit_code in (1, 2)


@bounded(60)
@given(data=st.data())
def test_suite_files(data: st.DataObject, tmp_path: Path, offline: None) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(gsm8k_row(number)) + "\n" for number in range(3)))
    content = yaml.safe_load(YAML.replace("sums.jsonl", "rows.jsonl"))
    if data.draw(st.booleans()):
        raw = data.draw(damage(yaml.safe_dump(content).encode()))
    else:
        made = data.draw(changed(content))
        raw = json.dumps(made).encode()
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(raw)
    loads_or_says_why(str(path))


@bounded(60)
@given(data=st.data())
def test_rows(data: st.DataObject, tmp_path: Path, offline: None) -> None:
    name = data.draw(st.sampled_from(["gsm8k", "babi", "own"]))
    rows = [babi_row("qa1", 2, 10 * n) for n in range(3)] if name == "babi" else [gsm8k_row(n) for n in range(3)]
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, 2))
        rows[place] = data.draw(changed(rows[place]))
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        raw = data.draw(damage("".join(json.dumps(row) + "\n" for row in rows).encode()))
    ending, skip = data.draw(st.sampled_from([".jsonl", ".jsonl.gz"])), data.draw(st.booleans())
    if ending == ".jsonl.gz":
        raw = data.draw(st.just(gzip.compress(raw)) | damage(gzip.compress(raw)))
    folder = tmp_path / "data" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stems = {"gsm8k": ("train", "test"), "babi": ("en_train", "en_test"), "own": ("sums",)}[name]
    for stem in stems:
        (folder / f"{stem}{ending}").write_bytes(raw)
    if name == "own":
        (folder / "own.yaml").write_text(YAML.replace("sums.jsonl", f"sums{ending}"))
        loads_or_says_why(str(folder / "own.yaml"), skip_bad_rows=skip)
    else:
        loads_or_says_why(name, data_dir=tmp_path / "data", skip_bad_rows=skip)


# Results


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small results folder with everything that is read again."""
    from flashmem_bench.latency.files import append
    from flashmem_bench.report import build_report

    root = tmp_path_factory.mktemp("whole") / "results"
    store = make_results(root, suites=("hops",), methods=("vanilla", "flashmem"), n=4)
    for cell in store.cells():
        (cell.path / "traces").mkdir()
        trace = made_trace("hops-test-00000", ["a", "b"])
        (cell.path / "traces" / "t.json").write_text(json.dumps(trace))
    common = {"model": "m", "device": "cpu", "dtype": "float32", "batch_size": 1, "exec": "eager", "protocol": "paper"}
    times = {"context": 64, "e2e_ms": 10.0, "prefill_ms": 2.0, "decode_ms": 8.0, "output_tokens": 5}
    append(root, [{**common, **times, "method": m, "run": n} for n in range(6) for m in ("vanilla", "flashmem")])
    (root / "engine").mkdir()
    (root / "engine" / "1.json").write_text("{}")
    build_report(root)
    shutil.rmtree(root / "figures")
    shutil.rmtree(root / "stories")
    return root


def says(line: list[str]) -> str:
    """Run a command in this process; returns what it printed on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(line)
    assert code in CODES, (line, code)
    said = err.getvalue()
    assert "Traceback" not in said + out.getvalue() and "error: unexpected " not in said, (line, said)
    assert code != 1 or "error: " in said or out.getvalue(), line
    return said


FILES = (
    "SCHEMA.json",
    "manifest.json",
    "samples.jsonl",
    "texts.jsonl",
    "t.json",
    "runs.jsonl",
    "samples.parquet",
    "claims",
)
QUICK = (["list", "runs"], ["list", "models"], ["verify"], ["compare", "flashmem", "vanilla"], ["regrade"])


def spoil(root: Path, data: st.DataObject) -> None:
    """Damage one file of a results folder, as bytes or as a JSON value of another type."""
    wanted = data.draw(st.sampled_from(FILES))
    paths = sorted(path for path in root.rglob("*") if path.is_file() and wanted in path.name)
    path = data.draw(st.sampled_from(paths))
    if path.suffix not in (".json", ".jsonl") or data.draw(st.booleans()):
        path.write_bytes(data.draw(damage(path.read_bytes())))
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = json.dumps(data.draw(changed(json.loads(lines[place]))))
    path.write_text("\n".join(lines) + "\n")


@bounded(20)
@given(data=st.data())
def test_results_folders(data: st.DataObject, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    spoil(root, data)
    line = data.draw(st.sampled_from(QUICK))
    says(
        [
            *line,
            "--results-dir",
            str(root),
            *data.draw(st.sampled_from([[], ["--json"]] if line != ["verify"] else [[]])),
        ]
    )


@bounded(8)
@given(data=st.data())
def test_reports_of_damaged_folders(data: st.DataObject, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "results"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    spoil(root, data)
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes most of the time and sees the tables alone, which are made all the same.
        for place in ("figures.draw_all", "outcome_figures.draw_outcomes", "benefit_figures.draw_benefit",
                      "cost_figures.draw_latency", "training.draw_training", "traces.draw_traces"):  # fmt: skip
            patch.setattr(f"flashmem_bench.report.{place}", lambda *_: [])
        says(["report", "--results-dir", str(root), "--json"])


# The command line

COMMANDS = ["run", "ablate", "train", "calibrate", "moments", "latency", "engine", "compare", "report", "regrade",
            "verify", "plan", "reproduce", "list", "describe", "doctor"]  # fmt: skip
OPTIONS = ["--suite", "--method", "--model", "--limit", "--seed", "--batch-size", "--device", "--dtype", "--set",
           "--truncate", "--match", "--checkpoint", "--data-dir", "--values", "--runs", "--contexts", "--margin",
           "--json", "--quiet", "--list", "--recipe", "--out", "--lr", "--steps", "--train-seed", "-s", "-n", "--",
           "--trust-suite", "--trace-samples", "--limit-sessions", "--no-such-option", "--version"]  # fmt: skip
# Nothing here names both a suite that runs without data and a model that loads: every line ends before any work.
WORDS = ["gsm8k", "hops", "flashmem", "vanilla", "../up", "/dev/null", "", "0", "-1", "4k", "1e400", "nan", "p85",
         "\x00", "trigger.threshold=1", "trigger.threshold=", "=", "memory.length=99999999999999999999", "x" * 300,
         "[red]", "\x1b[2J", "\udcff", "a,b,,c", "\u202e", "none", "true", "none/none", "x.yaml", "lm-eval/none",
         "$(touch x)"]  # fmt: skip
MODEL = ["--model", "no-such/model"]


@bounded(80)
@given(
    name=st.sampled_from(COMMANDS) | st.text(max_size=8),
    words=st.lists(st.sampled_from(OPTIONS) | st.sampled_from(WORDS) | st.text(max_size=6), max_size=7),
)
def test_command_lines(name: str, words: list[str], tmp_path: Path, offline: None) -> None:
    if name in ("engine", "latency", "doctor") and "--list" not in words:
        words = [*words, "--no-such-option"]
    outside = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(work)
    try:
        says(
            [
                name,
                *([] if name in ("compare", "report", "regrade", "verify", "list", "describe", "plan") else MODEL),
                *words,
            ]
        )
    finally:
        os.chdir(before)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path != work} == {
        path: stamp for path, stamp in outside.items() if path != work
    }
