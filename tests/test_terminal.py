"""Nothing that a model or a data set wrote can steer a terminal, whichever way it gets there."""

from __future__ import annotations

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench import terminal
from flashmem_bench.cli import main
from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError
from tests.hostile import MARKUP, TERMINAL, TEXTS, obeyed

PACKAGE = Path(terminal.__file__).parent
WILD = st.text(st.characters(codec=None), max_size=60)


@given(WILD)
def test_cleaned_text_is_as_long_and_obeyed_by_nobody(text: str) -> None:
    made = terminal.clean(text)
    assert not obeyed(made) and len(made) == len(text) and terminal.clean(made) == made


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=60))
def test_ordinary_text_stays(text: str) -> None:
    assert terminal.clean(f"{text}\n\t") == f"{text}\n\t"


@given(WILD)
def test_json_keeps_every_value(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", io.StringIO())
        terminal.emit_json({text: [text]})
        printed = terminal.sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert json.loads(printed) == {text: [text]} and not obeyed(printed)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_stream_in_another_encoding_takes_every_text(encoding: str, monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding))
    terminal.tell("\u4f60\u597d \udcff \U0001f600")
    assert raw.getvalue().endswith(b"\n")


@pytest.mark.parametrize("text", TEXTS)
def test_a_console_shows_text_as_text(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table(title=text, caption=text)
    table.add_column(text, overflow="fold")
    table.add_row(text)
    terminal.console().print(text, table)
    terminal.console(stderr=True).print(text, style="yellow")
    captured = capsys.readouterr()
    assert not obeyed(captured.out + captured.err)
    assert text != MARKUP or MARKUP in captured.err


def test_colours_of_ours_still_reach_a_terminal() -> None:
    file = io.StringIO()
    terminal.console(stderr=True, file=file, force_terminal=True, color_system="standard").print("x", style="red")
    assert "\x1b[31mx" in file.getvalue()


def test_log_records_and_tracebacks_are_cleaned() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(terminal.CleanFormatter())
    logger = logging.Logger("hostile")
    logger.addHandler(handler)
    try:
        raise ValueError(TERMINAL)
    except ValueError:
        logger.exception("sample %s", TERMINAL)
    assert "Traceback" in stream.getvalue() and not obeyed(stream.getvalue())


def test_a_bar_shows_a_hostile_title(capsys: pytest.CaptureFixture[str]) -> None:
    from flashmem_bench.progress import Bar

    bar = Bar()
    bar.start(TERMINAL + MARKUP, 2, 0)
    bar.advance({"score": 1.0, "triggers": 0, "output_tokens": 3, "e2e_ms": 2.0})
    bar.note(TERMINAL)
    bar.stop()
    captured = capsys.readouterr()
    assert MARKUP in captured.err and not obeyed(captured.err)


@pytest.mark.parametrize("error", [BenchError(TERMINAL), RuntimeError(TERMINAL)])
def test_errors_may_hold_what_a_model_wrote(error: Exception, monkeypatch, capsys) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("flashmem_bench.schema.find_column", fail)
    assert command(["describe", "score"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    monkeypatch.setattr("sys.argv", ["flashmem-bench", "describe", "score", "--debug"])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured_debug = capsys.readouterr()
    assert stopped.value.code == 1 and "Traceback" in captured_debug.err
    assert not obeyed(captured.err + captured_debug.err)


def test_arguments_come_back_in_sentences_that_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (["describe", TERMINAL], [TERMINAL], ["run", "--suite", TERMINAL, "--method", "vanilla"], [f"--{TERMINAL}"])
    for line in lines:
        assert command(line) == 2
    captured = capsys.readouterr()
    assert not obeyed(captured.out + captured.err)


def test_no_other_module_prints() -> None:
    # Programs of their own, whose stdout is a pipe or a terminal of whoever rebuilds the bundled backbone.
    own = {"terminal.py", "engine/prefill_process.py", "tiny/evaluate.py", "tiny/pretrain.py"}
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in own:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "Console", "rich.print"}, f"{path}:{node.lineno}"
                assert not called.endswith(("stdout.write", "stderr.write")), f"{path}:{node.lineno}"
