"""The README's commands and examples run as they are written, only smaller and on made-up data."""

from __future__ import annotations

import json
import re
import shlex
import types
from pathlib import Path

import pytest

from flashmem_bench import registry
from flashmem_bench.cli import run as run_command
from flashmem_bench.tiny import weights_dir

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HUB_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"
SMALLER = {
    "run": "--limit 2 --quiet",
    "ablate": "--limit 2 --values 50,85 --quiet",
    "calibrate": "--limit 3 --quiet",
    "train": "--steps 2 --batch-size 4 --limit 8 --validation 2 --targets gold --quiet",
    "moments": "--limit 3 --quiet",
    "report": "--quiet",
    "plan": "",
    "reproduce": "--quiet",
    "compare": "",
}


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return ["flashmem-bench report" if line == "make report" else line for line in lines]


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gsm8k of our own making in the upstream layout, and an empty folder to run in."""
    folder = tmp_path / "data" / "gsm8k"
    folder.mkdir(parents=True)
    for split, rows in (("train", 60), ("test", 4)):
        made = [
            {"question": f"Lin packs {n} boxes of 2 cups. How many cups?", "answer": f"{n} * 2 = {2 * n}\n#### {2 * n}"}
            for n in range(3, 3 + rows)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    monkeypatch.setenv("FLASHMEM_DATA", str(tmp_path / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def test_commands_run_in_the_order_of_the_page(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = commands()
    assert any(line.startswith("flashmem-bench run --suite gsm8k --method flashmem") for line in lines)
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "flashmem-bench", f"a line of the README that this test cannot run: {line}"
        while HUB_MODEL in words:
            at = words.index(HUB_MODEL)
            del words[at - 1 : at + 1]
        code = run_command([*words[1:], *SMALLER[words[1]].split()])
        output = capfd.readouterr()
        assert code == 0, f"{line}: {output.err}"
    assert (Path("results") / "report.html").exists()


def test_library_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "load_memory" in block]
    memory = weights_dir().parent / "checkpoints" / "joint" / "flashmem" / "seed0"
    code = code.replace(f'"{HUB_MODEL}", device="cuda", dtype="bfloat16"', repr(str(weights_dir())))
    code = re.sub(r'load_memory\("[^"]+"', f"load_memory({str(memory)!r}", code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("]")


def test_method_example(data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in blocks("python") if "MethodSpec" in block]
    assert len(code.splitlines()) < 40
    module = types.ModuleType("one_direction")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(__import__("sys").modules, "one_direction", module)
    monkeypatch.setitem(registry.METHODS, "flashmem-one-direction", "one_direction:SPEC")
    assert run_command(["run", "--suite", "hops", "--method", "flashmem-one-direction", "--limit", "2", "--quiet"]) == 0
    rows = list(Path("results/runs/hops/flashmem-one-direction").glob("*/samples.jsonl"))
    assert len(rows) == 1 and len(rows[0].read_text().splitlines()) == 2


def test_suite_example(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ((yaml,), (rows,)) = blocks("yaml"), blocks("json")
    assert len(yaml.splitlines()) < 40
    Path("mine").mkdir()
    Path("mine", "sums.yaml").write_text(yaml)
    Path("mine", "sums.jsonl").write_text(rows)
    (line,) = [line for block in blocks("console") for line in block.splitlines() if "mine/sums.yaml" in line]
    code = run_command([*shlex.split(line.removeprefix("$ flashmem-bench ")), "--json"])
    found = capfd.readouterr()
    assert code == 0, found.err
    cells = json.loads(found.out.splitlines()[-1])["cells"]
    assert [(cell["method"], cell["samples"]) for cell in cells] == [("vanilla", 2), ("flashmem", 2)]


def test_tables_name_every_method_and_suite() -> None:
    from flashmem_bench.suites import list_suites

    listed = re.findall(r"`(-?[a-z0-9][a-z0-9-]*)`", README.split("## Methods")[1].split("## Suites")[0])
    full = {f"flashmem{name}" if name.startswith("-") else name for name in listed}
    assert set(registry.METHODS) <= full
    section = README.split("## Suites")[1].split("## Add a method")[0]
    cells = re.findall(r"^\| ((?:`[a-z0-9_-]+`(?:, )?)+) \|", section, flags=re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert {info.name for info in list_suites()} == named
