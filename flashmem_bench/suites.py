"""Suite files: finding them and reading what they say, without running any of it.

A suite is an lm-eval task file with a `metadata.flashmem` part. The bundled ones lie in `_suites` of the
installed package or in `suites` of the source tree; a path that ends in `.yaml` names one of the user's
own, `lm-eval/<task>` a task of the installed lm-eval. Reading is safe YAML: `!function` becomes a
`FunctionName`, never a function, so that listing a suite, or deciding whether to trust one, executes
nothing of it. `flashmem_bench.tasks` loads a suite for real.

Light on purpose: the command line imports this module before it knows what it will do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from flashmem_bench.bounded_yaml import load_bounded, read_bounded
from flashmem_bench.choices import CHOICE_KINDS, GENERATED
from flashmem_bench.errors import DataError, UnknownNameError, UsageError

LM_EVAL_PREFIX = "lm-eval/"
_MOST_INCLUDED = 16
# What the values of some keys of lm-eval's task files are.
_KINDS: tuple[tuple[type | tuple[type, ...], str, tuple[str, ...]], ...] = (
    (str, "text", ("dataset_path", "output_type", "training_split", "validation_split", "test_split", "fewshot_split")),
    (dict, "a mapping", ("dataset_kwargs", "generation_kwargs", "metadata")),
    (list, "a list", ("metric_list", "filter_list")),
    ((str, list), "a name or a list of names", ("task", "include")),
)
_TASK_LINE = re.compile(rb"^[\"']?task[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class SuiteInfo:
    """What a suite file says about itself.

    Attributes:
        name: The name for `--suite`: the alias, the path of a file of one's own, or `lm-eval/<task>`.
        path: The YAML file.
        metadata: The file's `metadata.flashmem`; empty for a task of lm-eval.
        bundled: Whether the file belongs to this package or to lm-eval; any other file must be trusted to
            run code.
    """

    name: str
    path: Path
    title: str
    licence: str
    metadata: dict[str, Any] = field(hash=False)
    kind: Literal["generated", "real", "lm-eval"]
    bundled: bool = True


class FunctionName(str):
    """The name behind a `!function` tag, unresolved."""


# libyaml is ten times as fast and not everywhere.
_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _SuiteLoader(_FastLoader):
    """Safe YAML plus `!function` as a mere name."""


_SuiteLoader.add_constructor("!function", lambda loader, node: FunctionName(loader.construct_scalar(node)))


def suites_dir() -> Path:
    """Return the folder of the bundled suite files, of the installed package or of the source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_suites"
    return installed if installed.is_dir() else package.parent / "suites"


def list_suites() -> list[SuiteInfo]:
    """Return the bundled suites in alphabetical order."""
    return sorted((_info(path) for path in suites_dir().glob("*.yaml")), key=lambda info: info.name)


def find_suite(name: str) -> SuiteInfo:
    """Return the suite called `name`.

    Args:
        name: An alias (`gsm8k`), the task name (`flashmem_gsm8k`), a path to a `.yaml` file, or
            `lm-eval/<task>`.

    Raises:
        UnknownNameError: No such suite; the message gives near misses.
        DataError: The suite file cannot be read.
    """
    if name.startswith(LM_EVAL_PREFIX):
        return _find_lm_eval(name)
    if name.endswith((".yaml", ".yml")):
        return _find_file(name)
    known = {info.name: info for info in list_suites()}
    alias = name.removeprefix("flashmem_")
    if alias not in known:
        raise UnknownNameError("suite", name, known)
    return known[alias]


def data_folders(info: SuiteInfo) -> list[str]:
    """Return the folders below a data folder that a suite of real data reads."""
    files = info.metadata.get("files") or {}
    named = [name for names in files.values() for name in ([names] if isinstance(names, str) else names)]
    return list(dict.fromkeys(str(name).partition("/")[0] for name in named)) or [info.name]


def read_suite_file(path: Path) -> dict[str, Any]:
    """Return the suite file as data, with the files that it includes merged in as lm-eval does.

    Raises:
        DataError: It, or a file that it includes, is missing, is not YAML or is not a mapping.
    """
    return _merged(path.resolve(), (), {})


def suite_files(path: Path) -> list[Path]:
    """Return a suite file, all that it includes, and the data files that it names and that lie beside it.

    Raises:
        DataError: As `read_suite_file`.
    """
    named = (read_suite_file(path).get("dataset_kwargs") or {}).get("data_files") or []
    entries = named.values() if isinstance(named, Mapping) else [named]
    names = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
    beside = [path.resolve().parent / str(name) for name in names if not Path(str(name)).is_absolute()]
    return [*_chain(path.resolve()), *(file for file in beside if file.is_file())]


def judges_given_answers(info: SuiteInfo) -> bool:
    """Return whether a suite compares the likelihoods of given answers instead of generating one."""
    return read_suite_file(info.path).get("output_type", GENERATED) in CHOICE_KINDS


def _merged(path: Path, above: tuple[Path, ...], done: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    if path in done:
        return done[path]
    if path in above:
        raise DataError(f"{path} includes itself; remove the circle")
    if len(above) > _MOST_INCLUDED:
        raise DataError(f"{path} is included at the end of {len(above)} files; put them together")
    own = _parse(path)
    merged: dict[str, Any] = {}
    for included in _includes(path, own):
        merged.update(_merged(included, (*above, path), done))
    done[path] = {key: value for key, value in {**merged, **own}.items() if key != "include"}
    return done[path]


def _includes(path: Path, content: Mapping[str, Any]) -> list[Path]:
    names = content.get("include") or []
    try:
        found = [(path.parent / str(name)).resolve() for name in (names if isinstance(names, list) else [names])]
    except ValueError as error:
        raise DataError(f"the suite file {path} includes something that is no file name: {error}") from error
    return list(dict.fromkeys(found))


def _chain(path: Path) -> list[Path]:
    """Return a file and all that it includes, each once."""
    found, waiting = [], [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.append(file)
            waiting += _includes(file, _parse(file))
    return found


def _parse(path: Path) -> dict[str, Any]:
    try:
        # A few of lm-eval's own tasks say something twice; they run as they do there.
        content = load_bounded(read_bounded(path), _SuiteLoader, keys_once=_lm_eval_tasks_dir() not in path.parents)
    except OSError as error:
        raise DataError(f"the suite file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"the suite file {path} cannot be used: {error}; mend it") from error
    if not isinstance(content, dict):
        raise DataError(f"the suite file {path} is not a mapping; it must be an lm-eval task file")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise DataError(f"the suite file {path} has the key {odd[0]!r}, which is not text; put it in quotes")
    _check_kinds(content, path)
    return content


def _check_kinds(content: Mapping[str, Any], path: Path) -> None:
    """Refuse a key whose value can mean nothing; what else a value must be, lm-eval says."""
    for kind, what, keys in _KINDS:
        for key in keys:
            if content.get(key) is not None and not isinstance(content[key], kind):
                raise DataError(
                    f"the suite file {path} has under {key} {str(content[key])[:60]!r}, which is not {what}"
                )
    for key in ("metric_list", "filter_list"):
        if not all(isinstance(entry, dict) for entry in content.get(key) or ()):
            raise DataError(f"the suite file {path} has something under {key} that is not a mapping")
    own = (content.get("metadata") or {}).get("flashmem")
    files = own.get("files") if isinstance(own, dict) else None
    if files is not None and not isinstance(files, dict):
        raise DataError(f"the suite file {path} has under metadata.flashmem.files something that is not a mapping")


def runs_code(info: SuiteInfo) -> bool:
    """Return whether grading the suite runs programs that the model writes."""
    # The key with which a task of lm-eval says the same.
    return bool(info.metadata.get("runs_code") or read_suite_file(info.path).get("unsafe_code"))


def function_names(path: Path) -> list[str]:
    """Return every `!function` name in a suite file and the files that it includes.

    The files' events are read, not their content: a value that a later key replaces is gone from the
    content, yet lm-eval would have imported its function.
    """
    names = []
    for file in _chain(path.resolve()):
        events = yaml.parse(file.read_bytes(), Loader=_SuiteLoader)
        names += [str(getattr(event, "value", "")) for event in events if getattr(event, "tag", None) == "!function"]
    return sorted(set(names))


def _info(path: Path, name: str | None = None, bundled: bool = True) -> SuiteInfo:
    content = read_suite_file(path)
    metadata = content.get("metadata")
    own = metadata.get("flashmem", {}) if isinstance(metadata, dict) else {}
    if not isinstance(own, dict):
        raise DataError(f"metadata.flashmem of {path} is not a mapping")
    return SuiteInfo(
        name=name or str(own.get("alias", path.stem)),
        path=path,
        title=str(own.get("title", content.get("task", path.stem))),
        licence=str(own.get("licence", "not stated")),
        metadata=own,
        kind="generated" if own.get("kind") == "generated" else "real",
        bundled=bundled,
    )


def _find_file(name: str) -> SuiteInfo:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"there is no suite file {name}; give a path, or a name that flashmem-bench list suites shows")
    bundled = path.resolve().parent == suites_dir().resolve()
    info = _info(path.resolve(), name=None, bundled=bundled)
    return info if bundled else dataclasses.replace(info, name=info.path.stem)


def _find_lm_eval(name: str) -> SuiteInfo:
    task = name.removeprefix(LM_EVAL_PREFIX)
    path = _lm_eval_files(task)
    if path is None:
        known = lm_eval_task_names()
        raise UnknownNameError("suite", name, [LM_EVAL_PREFIX + other for other in known])
    return SuiteInfo(name, path, f"lm-eval's {task}", "see the task's own page", {}, "lm-eval")


def _lm_eval_files(task: str) -> Path | None:
    """Return the file of an lm-eval task, by its file name first: opening all of them takes a while."""
    root = _lm_eval_tasks_dir()
    by_name = sorted(path for path in _yaml_files(root) if path.stem == task)
    for path in by_name:
        if _task_name(path) == task:
            return path
    return _lm_eval_index().get(task)


def lm_eval_task_names() -> list[str]:
    """Return the names of all tasks of the installed lm-eval; opens every file once."""
    return sorted(_lm_eval_index())


@lru_cache(maxsize=1)
def _lm_eval_index() -> dict[str, Path]:
    index: dict[str, Path] = {}
    for path in sorted(_yaml_files(_lm_eval_tasks_dir())):
        task = _task_name(path)
        if task:
            index.setdefault(task, path)
    return index


def _task_name(path: Path) -> str | None:
    found = _TASK_LINE.search(path.read_bytes())
    return found.group(1).decode("utf-8", "replace") if found else None


def _yaml_files(root: Path) -> Iterator[Path]:
    for folder, _, files in os.walk(root):
        yield from (Path(folder, file) for file in files if file.endswith(".yaml"))


def _lm_eval_tasks_dir() -> Path:
    # A top-level name is located without importing the package.
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise DataError("lm-eval is not installed; install it with: pip install 'lm-eval>=0.4.13,<0.5'")
    return Path(spec.origin).parent / "tasks"
