"""What is never done with files from elsewhere: unpickle, run their code, load unsafe YAML, pass text to a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashmem.errors import FlashMemError
from flashmem.loading import load
from tests.random_model import make_model

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for part in ("flashmem", "flashmem_bench", ".ci", "suites") for path in (ROOT / part).rglob("*.py")
)

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "code", "codeop"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
         "yaml.load_all", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle"}  # fmt: skip
# (file, what) -> why it may.
ALLOWED = {
    ("flashmem_bench/bounded_yaml.py", "yaml.load"): "with safe loaders alone; in suites !function is a mere name",
    ("flashmem_bench/grading/jail/program.py", "exec"): "runs the model's program inside the sandbox: that is its work",
}


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a module does what it should not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in MODULES:
            yield node.lineno, node.module
        elif (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in {"eval", "exec", "__import__"}
        ):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in {*CALLS, "yaml.load"}:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg in {"shell", "allow_pickle"} and _true(node.value):
            yield node.value.lineno, f"{node.arg}=True"
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and _true(node.value):
            yield node.value.lineno, "trust_remote_code=True"
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            yield node.value.lineno, "weights_only"


def _true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and bool(node.value)


def test_no_module_unpickles_or_runs_text() -> None:
    assert len(SOURCES) > 150
    found = {
        (str(path.relative_to(ROOT)), what): line
        for path in SOURCES
        for line, what in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == ALLOWED.keys(), {place: line for place, line in found.items() if place not in ALLOWED}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(x)", "eval('1')", "yaml.load(x)", "np.load(x)",
     "run(x, shell=True)", "np.fromfile(x, allow_pickle=True)", "load(x, trust_remote_code=True)", "f = exec"],
)  # fmt: skip
def test_the_walk_sees_each_of_them(line: str) -> None:
    assert list(forbidden(ast.parse(line)))


def test_every_model_comes_from_safetensors_and_without_code_of_its_own() -> None:
    """Each call that loads a model says so; and what decides over remote code is off where it is not asked for."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "AutoModelForCausalLM.from_pretrained":
                assert any(keyword.arg == "use_safetensors" and _true(keyword.value) for keyword in node.keywords), path
            # Left to itself, transformers asks a person at the terminal whether to run the code.
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                f"Auto{kind}.from_pretrained" for kind in ("Config", "Tokenizer", "ModelForCausalLM")
            }:
                assert {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}, (path, node.lineno)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                _require_off(node)


def _require_off(function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    arguments = function.args
    placed = [*arguments.posonlyargs, *arguments.args]
    defaults = dict(zip([one.arg for one in placed][::-1], arguments.defaults[::-1], strict=False))
    defaults |= {
        one.arg: value for one, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if value
    }
    if "trust_remote_code" in defaults:
        default = defaults["trust_remote_code"]
        assert isinstance(default, ast.Constant) and default.value is False, function.name


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("with_code", [False, True])
def test_a_model_of_pickled_weights_is_refused_unopened(with_code: bool, tmp_path: Path) -> None:
    folder, mark = make_model(tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(FlashMemError, match="never opened, since a pickle") as caught:
        load(folder, "float32", with_code)
    assert caught.value.exit_code == 1 and not mark.exists()


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    import json

    folder, mark = make_model(tmp_path / "model"), tmp_path / "mark"
    (folder / "modeling_own.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    for change in ({"auto_map": own}, {"auto_map": own, "model_type": "own"}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        if "model_type" in change:
            with pytest.raises(FlashMemError):
                load(folder, "float32", False)
        else:
            load(folder, "float32", False)
    assert not mark.exists()
