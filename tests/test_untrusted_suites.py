"""A suite file that nobody vouches for costs a sentence, never code, gigabytes or hours."""

from __future__ import annotations

import json
import resource
import signal
import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from flashmem_bench import sandboxed
from flashmem_bench.bounded_yaml import MOST_BYTES, MOST_DEPTH, MOST_VALUES, load_bounded
from flashmem_bench.cli import run as command
from flashmem_bench.errors import BenchError, DataError
from flashmem_bench.sandboxed import Sandbox
from flashmem_bench.suites import find_suite
from flashmem_bench.tasks import load_suite

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, 40))
BAD = {
    "bomb": (LAUGHS, f"more than {MOST_VALUES:,} values"),
    "bomb of mappings": (MERGES, "more than"),
    "nested": ("x: " + "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1), "nested more than"),
    "very nested": ("x: " + "[" * 100_000, "nested more than"),
    "itself": ("x: &x [1, *x]", "holds itself"),
    "large": ("# " + "x" * MOST_BYTES, "more than 1 MiB"),
    "twice": ("task: a\ntask: b", "'task' comes twice (line 2)"),
    "python": ("x: !!python/object/apply:os.system [touch ran]", "not valid YAML"),
    "python name": ("x: !!python/name:os.system", "not valid YAML"),
    "unknown tag": ("x: !thing 3", "not valid YAML"),
    "function of a list": ("x: !function [a, b]", "not valid YAML"),
    "date": ("x: 2001-99-99", "month must be in"),
    "number": (f"x: {'9' * 5000}", "cannot be used"),
    "float": ("x: !!float much", "cannot be used"),
    "undefined": ("x: *nobody", "not valid YAML"),
    "two documents": ("x: 1\n---\ny: 2", "not valid YAML"),
    "not a mapping": ("- a\n- b", "not a mapping"),
    "nothing": ("", "not a mapping"),
    "odd keys": ("1: x", "is not text"),
    "bytes": ("x: \x07", "not valid YAML"),
    "itself included": ("include: s.yaml", "includes itself"),
    "nul included": ('include: "a\\0b"', "no file name"),
    "folder included": ("include: .", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_suite_file_is_one_sentence(kind: str, tmp_path: Path, monkeypatch, capfd) -> None:
    content, words = BAD[kind]
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(content)
    assert command(["run", "--suite", "s.yaml", "--method", "vanilla", "--quiet"]) in (1, 2)
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: ") and words in said and len(said.splitlines()) == 1 and "unexpected" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]


def test_includes_that_double_at_every_step_are_read_once(tmp_path: Path) -> None:
    for step in range(14):
        for half in "ab":
            names = [f"{other}{step + 1}.yaml" for other in "ab"] if step < 13 else []
            (tmp_path / f"{half}{step}.yaml").write_text(json.dumps({"include": names, "task": f"{half}{step}"}))
    assert find_suite(str(tmp_path / "a0.yaml")).title == "a0"
    for step in range(30):
        (tmp_path / f"c{step}.yaml").write_text(f"include: c{step + 1}.yaml\n")
    with pytest.raises(DataError, match="put them together"):
        find_suite(str(tmp_path / "c0.yaml"))


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text("abc :#-", max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=30,
)


@given(VALUE)
def test_what_is_within_bounds_reads_as_ever(value: object) -> None:
    assert load_bounded(yaml.safe_dump(value).encode(), yaml.SafeLoader) == value


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_a_clause(content: bytes) -> None:
    try:
        load_bounded(content, yaml.CSafeLoader)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)


# Templates


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(sandboxed, "DEADLINE_S", 0.3)
    monkeypatch.setattr(sandboxed, "MEMORY_BYTES", 2**28)


ENDLESS = {
    "loops": "{% set r = range(99999) %}" + "{% for a in r %}" * 3 + "{% endfor %}" * 3,
    "doubled text": "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "times": "{{ ('x' * 10 ** 11) | length }}",
    "centred": "{{ 'x' | center(100000000000) }}",
    "formatted": "{{ '%0100000000000d' | format(3) }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "product": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "range": "{{ range(10 ** 9) | list | length }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "expression": "{{ text | regex_replace('(a|aa)+$', 'b') }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.usefixtures("impatient")
def test_a_template_comes_to_an_end(kind: str) -> None:
    import re

    sandbox = Sandbox()
    sandbox.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by, text)
    limits, timer = resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL)
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises((TemplateError, OverflowError)):
        sandbox.from_string(ENDLESS[kind]).render(text="a" * 5000 + "c")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits and signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == timer


def test_templates_of_prompts_render_as_ever_in_any_thread() -> None:
    sandbox, found = Sandbox(), []
    template = sandbox.from_string(
        "{% for c in choices %}{{ loop.index }}. {{ c|trim }} {% endfor %}{{ 3 * 4 ** 2 }}\n"
    )
    run = threading.Thread(target=lambda: found.append(template.render(choices=[" a", "b "])))
    run.start()
    run.join()
    assert found == [template.render(choices=[" a", "b "])] == ["1. a 2. b 48\n"]


@pytest.mark.parametrize(
    "template", ["{{ choices.append(1) }}", "{{ doc.update(a=1) }}", "{{ doc.__setitem__(1, 2) }}"]
)
def test_a_template_changes_no_row(template: str) -> None:
    choices, doc = ["a"], {"b": 1}
    with pytest.raises(TemplateError):
        Sandbox().from_string(template).render(choices=choices, doc=doc)
    assert choices == ["a"] and doc == {"b": 1}


@pytest.mark.usefixtures("impatient")
def test_an_endless_template_of_a_suite_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "endless", "a": "b"}\n')
    loops = ENDLESS["loops"]
    (tmp_path / "s.yaml").write_text(
        "task: s\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_target: '{{a}}'\n"
        f"doc_to_text: \"{{% if q == 'endless' %}}{loops}{{% endif %}}{{{{q}}}}\"\n"
        "metadata: {version: 1, flashmem: {grader: numbers}}\n"
    )
    suite = load_suite(str(tmp_path / "s.yaml"))
    assert suite.samples()[0].prompt == "a"
    with pytest.raises(BenchError, match=r"row 2 of test: .*longer than 0\.3 seconds; mend the suite file"):
        suite.samples()[1]
