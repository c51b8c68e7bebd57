"""Suites in action: documents, prompts, filters and metrics through lm-eval's own Task objects.

With `lm_eval_model`, this is the only file that imports lm-eval. It loads one task file by its path, never
lm-eval's index of fourteen thousand, and turns it into a `Suite`: samples in a fixed order, rendered one by one when
they are looked at, and grades that are exactly what lm-eval's filters and `process_results` say. The generation loop,
the timing and the averages are not here.

Invariants: the same file and data give the same samples and the same `content_hash` in every process; an error of the
data or the file is a `DataError` with the next step; Jinja templates run in a sandbox, whoever wrote them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashmem.errors import FlashMemError
from flashmem_bench import choices as given
from flashmem_bench.data import Doc
from flashmem_bench.errors import BenchError, DataError, UsageError
from flashmem_bench.grading import named
from flashmem_bench.grading.code import ALLOW, ALLOW_UNCONTAINED, TELL_TIMEOUT, permit_code
from flashmem_bench.grading.hooks import NO_ANSWER
from flashmem_bench.grading.outcome import GradeTimeout
from flashmem_bench.samples import GenerationArgs, Grade, Likelihoods, Sample
from flashmem_bench.sources import local
from flashmem_bench.suites import SuiteInfo, find_suite, function_names, read_suite_file, runs_code

__all__ = ["GenerationArgs", "Grade", "Sample", "SampleList", "Suite", "load_suite"]

# lm-eval's own default seed for choosing few-shot examples.
_FEWSHOT_SEED = 1234
# lm-eval's budget where a task states none.
_DEFAULT_NEW_TOKENS = 256
# A task without a calibration split lends the end of its training split.
_BORROWED_SHARE = 0.05
# Of the names under which `datasets` reads files, those that hold data and nothing that could run.
_PLAIN_BUILDERS = {"arrow", "csv", "json", "parquet", "text"}
_SPLITS = ("test", "calibration", "validation", "train")


class SampleList(Sequence[Sample]):
    """The samples of one split, rendered when first looked at.

    Few-shot examples are drawn in the order of the samples from one random stream, as lm-eval does, so a
    sample renders those before it first.
    """

    def __init__(self, suite: Suite, split: str, docs: Sequence[Doc]):
        self._suite, self._split, self._docs = suite, split, docs
        self._rendered: dict[int, Sample] = {}
        self._rng = random.Random(_FEWSHOT_SEED)

    def __len__(self) -> int:
        return len(self._docs)

    def sessions(self) -> list[str | None]:
        """Return the session of each sample, without rendering any."""
        return [self._suite.session_of(doc) for doc in self._docs]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if position not in self._rendered:
            start = len(self._rendered) if self._suite.num_fewshot else position
            for i in range(start, position + 1):
                self._rendered[i] = self._suite.render(self._docs[i], self._split, i, self._rng)
        return self._rendered[position]


class Suite:
    """A loaded suite.

    Attributes:
        content_hash: 16 hex digits of everything in the suite that can change a prompt or a grade.
        primary_metric: The metric that is the score, named `<metric>,<filter>` as lm-eval does.
        generation: How completions are to be generated; one token where given answers are judged.
        given_answers: The likelihoods of given answers are compared and nothing is generated.
        memory_defaults: The suite's own settings as dotted `--set` keys.
        calibrate_by: `stratum` where each stratum has its own threshold.
        strata: What strata are for: `known` (near 100 % for the bundled backbone), `open`, `chance`.
        allow_code: Whether grading may run programs that the model writes.
        allow_uncontained: Whether it may do so where nothing keeps them in.
    """

    allow_code = False
    allow_uncontained = False

    def __init__(self, info: SuiteInfo, task: Any, content_hash: str):
        self.name, self.info, self.content_hash = info.name, info, content_hash
        self._task = task
        self.num_fewshot = task.config.num_fewshot or 0
        self.given_answers = task.OUTPUT_TYPE in given.CHOICE_KINDS
        wanted = task.config.generation_kwargs or {}
        self.generation = GenerationArgs(1, ()) if self.given_answers else generation_args(wanted)
        self.primary_metric = _primary_metric(info, task)
        self.calibrate_by = info.metadata.get("calibrate_by")
        self.prefix_field: str | None = info.metadata.get("prefix_field")
        self.strata: dict[str, list[str]] = dict(info.metadata.get("strata") or {})
        self.memory_defaults = memory_defaults(info.metadata)
        self._lists: dict[str, SampleList] = {}

    @property
    def bad_rows(self) -> int:
        """Broken rows left out so far, over the files that were read."""
        return getattr(self._task.dataset, "bad_rows", 0)

    @property
    def grader(self) -> str:
        """Name and version of what grades: the suite's own grader with its package, else lm-eval."""
        own, package = self.info.metadata.get("graded_by"), self.info.metadata.get("grader_package")
        if own is None and "grader" in self.info.metadata:
            own, package = named.version_of(str(self.info.metadata["grader"]))
        versions = [f"{name} {version(name)}" for name in (package, None if own else "lm-eval") if name]
        return " / ".join([*versions, *([str(own)] if own else [])])

    @property
    def task(self) -> Any:
        """The lm-eval Task behind the suite."""
        return self._task

    def samples(self, split: str = "test") -> Sequence[Sample]:
        """Return the samples of `test`, `calibration`, `validation` or `train` in their fixed order.

        Raises:
            UsageError: The suite has no such split.
            DataError: The split is empty or its data is broken.
        """
        if split not in self._lists:
            with _one_sentence(self.info, {}):
                docs = _documents(self._task, self.name, split)
            if not len(docs):
                raise DataError(f"the split {split!r} of {self.name} is empty; check its data")
            self._lists[split] = SampleList(self, split, docs)
        return self._lists[split]

    def render(self, doc: Doc, split: str, index: int, rng: random.Random) -> Sample:
        """Return the sample of a document; `rng` draws the few-shot examples, where the task wants any.

        Raises:
            DataError: A template fails on this document.
        """
        try:
            return self._rendered(doc, split, index, rng)
        except BenchError:
            raise
        except Exception as error:
            why = _template_failure(error) or f"{type(error).__name__}: {error}"
            raise DataError(
                f"a template of {self.info.path} fails on row {index + 1} of {split}: {why}; mend the suite file"
            ) from error

    def _rendered(self, doc: Doc, split: str, index: int, rng: random.Random) -> Sample:
        doc, target, prompt = dict(doc), self._target(doc), self._prompt(doc, rng)
        contexts = tuple(prompt) if isinstance(prompt, list) else ()
        # A field of lm-eval's tasks may be called so and mean anything.
        own = self.info.kind != "lm-eval"
        return Sample(
            sample_id=str(doc["id"])
            if own and doc.get("id")
            else f"{self.name.rpartition('/')[2]}-{split}-{index:05d}",
            prompt=contexts[0] if contexts else prompt,
            target=target,
            answer=str(doc["gold"]) if own and doc.get("gold") is not None else target,
            stratum=str(doc["stratum"]) if own and doc.get("stratum") is not None else None,
            doc=doc,
            moments=tuple(doc.get("moments") or ()) if own else (),
            cluster=str(doc["cluster"]) if own and doc.get("cluster") is not None else None,
            session_id=self.session_of(doc),
            prefix=str(doc[self.prefix_field]) if self.prefix_field and doc.get(self.prefix_field) else None,
            choices=given.choices_of(self._task, doc),
            contexts=contexts,
        )

    def session_of(self, doc: Doc) -> str | None:
        """Return the session that a document belongs to; only a suite that names its `prefix_field` has any."""
        return str(doc["session_id"]) if self.prefix_field and doc.get("session_id") is not None else None

    def requests(self, sample: Sample, *, templated: bool) -> list[tuple[str, str]]:
        """Return what is judged of a sample whose answers are given; see `choices.requests`."""
        return given.requests(self._task, sample, templated=templated)

    def grade(self, sample: Sample, text: str) -> Grade:
        """Grade a completion with the task's filters and metrics.

        A grader that fails on this text gives `parse_status="error"` and no points; one that runs into its deadline
        gives "timeout" and no points, which count only where the text is to blame. A library that the grader needs
        and that is not installed is a `DataError`, since it would fail on every text.

        Raises:
            UsageError: Grading would run programs and nobody allowed that.
        """
        try:
            extracted, metrics = self._metrics(sample, text)
        except ImportError as error:
            raise DataError(f"grading {self.name} needs a package that is not installed: {error}") from error
        except FlashMemError:
            raise
        except GradeTimeout as late:
            metrics = {self.primary_metric: 0.0} if late.counts_as_wrong else {}
            return Grade(0.0, "timeout", metrics, None, counts=late.counts_as_wrong)
        except Exception as error:
            logging.getLogger(__name__).warning("grading %s failed: %r", sample.sample_id, error)
            return Grade(0.0, "error", {}, None)
        if self.primary_metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise UsageError(
                f"the primary metric {self.primary_metric!r} of {self.name} is none of its metrics: {known}"
            )
        score = metrics[self.primary_metric]
        missing = extracted is None and not self.given_answers
        return Grade(score, "no_answer" if missing else "ok", metrics, extracted)

    def _metrics(self, sample: Sample, text: str) -> tuple[str | None, dict[str, float]]:
        """Return what the primary metric's filter extracted and every metric under every filter."""
        if self.given_answers:
            return self._likelihood_metrics(sample, Likelihoods.from_text(text))
        from lm_eval.api.instance import Instance

        instance = Instance("generate_until", doc=sample.doc, arguments=(sample.prompt, {}), idx=0, resps=[text])
        metrics: dict[str, float] = {}
        extracted: str | None = None
        doc = self._with_permission(sample.doc)
        for ensemble in self._task._filters:
            ensemble.apply([instance])
            filtered = instance.filtered_resps[ensemble.name]
            found = self._task.process_results(doc, [filtered])
            metrics |= {f"{name},{ensemble.name}": value for name, value in self._numbers(found)}
            if self.primary_metric.rpartition(",")[2] == ensemble.name:
                if not found:
                    raise GradeTimeout(f"no metric of {sample.sample_id} within the deadline", counts_as_wrong=False)
                extracted = _extracted(filtered)
        return extracted, metrics

    def _likelihood_metrics(self, sample: Sample, found: Likelihoods) -> tuple[str | None, dict[str, float]]:
        """Return the likeliest choice and every metric under every filter."""
        metrics: dict[str, float] = {}
        for name, values in given.metrics(self._task, sample, found):
            metrics |= {f"{metric},{name}": value for metric, value in self._numbers(values)}
        return given.chosen(sample, found), metrics

    def _with_permission(self, doc: Doc) -> Doc:
        """Tell a grader of programs what it may do; a task of lm-eval's own has one that knows no sandbox."""
        if not runs_code(self.info):
            return doc
        if self.info.kind == "lm-eval":
            permit_code(self.info, self.allow_code, self.allow_uncontained)
            return doc
        return {**doc, ALLOW: self.allow_code, ALLOW_UNCONTAINED: self.allow_uncontained, TELL_TIMEOUT: True}

    def _numbers(self, found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for name, value in found.items():
            if value is None:
                continue
            if not isinstance(value, (int, float)) and not hasattr(value, "item"):
                # A metric over a whole corpus (BLEU, say) comes as its ingredients; taken over this one
                # sample.
                value = self._task.aggregation()[name]([value])
            yield name, float(value)

    def _prompt(self, doc: Doc, rng: random.Random) -> str | list[str]:
        if self.num_fewshot:
            self._task.sampler.rnd = rng
        return self._task.fewshot_context(doc, self.num_fewshot, gen_prefix=self._task.doc_to_prefix(doc))

    def _target(self, doc: Doc) -> str:
        target = self._task.doc_to_target(doc)
        if self.given_answers:
            return given.right_choice(target, given.choices_of(self._task, doc))
        return _first(target)


def memory_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a suite's `metadata.flashmem` asks for, as dotted `--set` keys."""
    parts = ((part, metadata.get(part) or {}) for part in ("memory", "trigger"))
    return {f"{part}.{key}": value for part, values in parts for key, value in values.items()}


def load_suite(
    name: str,
    *,
    data_dir: Path | None = None,
    skip_bad_rows: bool = False,
    trust_suite: bool = False,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    allow_uncontained: bool = False,
) -> Suite:
    """Load a suite.

    Args:
        name: A bundled suite, a path to a suite file, or `lm-eval/<task>`.
        data_dir: Folder with `<suite>/<file>.jsonl[.gz]`; without one `FLASHMEM_DATA`, then the hub.
        skip_bad_rows: Go on without broken rows; `Suite.bad_rows` counts them.
        trust_suite: Run the functions that a suite file from outside the package names.
        seed: Seed of a generated suite's rows; another seed is another suite content.
        settings: Settings of a generated suite's generator, such as `pairs` of `recall`.
        allow_code: Let grading run programs that the model writes.
        allow_uncontained: Let it do so where nothing keeps them in.

    Raises:
        UnknownNameError: No such suite.
        UsageError: A task of a kind that cannot run here, an untrusted file that holds code, or a refused
            setting.
        DataError: The data is missing, broken or empty.
    """
    info = find_suite(name)
    content = read_suite_file(info.path)
    with _one_sentence(info, content):
        suite = _load(info, content, data_dir, skip_bad_rows, trust_suite, seed, settings)
    suite.allow_code, suite.allow_uncontained = allow_code, allow_uncontained
    return suite


def _load(
    info: SuiteInfo,
    content: Mapping[str, Any],
    data_dir: Path | None,
    skip_bad_rows: bool,
    trust_suite: bool,
    seed: int,
    settings: Mapping[str, Any] | None,
) -> Suite:
    if info.kind == "lm-eval":
        _refuse_other_kinds(info.name, content)
    elif not info.bundled and not trust_suite:
        _refuse_code(info.path, content)
    _refuse_settings(info, settings or {})
    extra = {"data_dir": str(data_dir) if data_dir else None, "skip_bad_rows": skip_bad_rows, "seed": seed}
    own = {**extra, "settings": dict(settings or {})} if info.kind != "lm-eval" else None
    task = _load_task(info, content, own, data_dir, skip_bad_rows)
    _refuse_other_kinds(info.name, {"output_type": task.OUTPUT_TYPE})
    return Suite(info, task, _content_hash(info, content, task, seed, settings))


@contextlib.contextmanager
def _one_sentence(info: SuiteInfo, content: Mapping[str, Any]) -> Iterator[None]:
    """Turn whatever a suite file or its rows make fail into a sentence with the file."""
    try:
        yield
    except FlashMemError:
        raise
    except Exception as error:
        raise DataError(_load_failure(info, content, error)) from error


def _refuse_settings(info: SuiteInfo, settings: Mapping[str, Any]) -> None:
    """Refuse settings that a suite's rows do not depend on; a generator refuses its own."""
    known = info.metadata.get("data_settings") or []
    if info.kind == "generated" or set(settings) <= set(known):
        return
    odd = ", ".join(sorted(set(settings) - set(known)))
    said = f"its data settings are {', '.join(known)}" if known else "it has no data settings"
    raise UsageError(f"{info.name} is not a generated suite with a setting {odd}; {said}")


def _refuse_other_kinds(name: str, content: Mapping[str, Any]) -> None:
    if "class" in content:
        raise UsageError(f"{name} is a Python task of lm-eval; only YAML tasks run here")
    kind = content.get("output_type", "generate_until")
    if kind not in (given.GENERATED, *given.CHOICE_KINDS):
        raise UsageError(
            f"{name} is a {kind} task, which has no prompt and so no place for a memory; "
            f"{given.GENERATED}, {' and '.join(given.CHOICE_KINDS)} tasks run here"
        )


def _refuse_code(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a file from outside the package through which code of its own could run."""
    # Each of these makes lm-eval or datasets import, download or unpickle code.
    keys = [key for key in ("class", "unsafe_code", "use_prompt") if content.get(key)]
    metrics = [entry for entry in content.get("metric_list") or [] if isinstance(entry, dict)]
    if any(entry.get("hf_evaluate") for entry in metrics):
        keys.append("hf_evaluate")
    keys += [f"metric {entry.get('metric')}" for entry in metrics if not _known_metric(entry.get("metric"))]
    if (content.get("dataset_kwargs") or {}).get("trust_remote_code"):
        keys.append("trust_remote_code")
    if content.get("dataset_path") in _builders() - _PLAIN_BUILDERS:
        keys.append(f"dataset_path {content['dataset_path']}")
    names = [*function_names(path), *keys]
    if names:
        raise UsageError(f"{path} names code ({', '.join(names)}); read it, then run it with --trust-suite")


def _known_metric(name: Any) -> bool:
    """Return whether lm-eval has a metric itself; any other it looks for in `evaluate`, which runs what it finds."""
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    return name in metric_registry


def _builders() -> set[str]:
    """Return the names under which `datasets` reads files, found without importing it."""
    spec = importlib.util.find_spec("datasets")
    folder = Path(str(spec.origin)).parent / "packaged_modules" if spec is not None else Path()
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def _load_task(
    info: SuiteInfo,
    content: Mapping[str, Any],
    own: Mapping[str, Any] | None,
    data_dir: Path | None,
    skip_bad_rows: bool,
) -> Any:
    """Build lm-eval's Task of a suite file; `own` reaches the file's `custom_dataset` function."""
    from flashmem_bench.hub import quick_hub

    _prepare_lm_eval()
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager(include_defaults=False, metadata=dict(own) if own else None)
    built: list[Any] = []
    try:
        replaced = _replaced_keys(info, content, data_dir, skip_bad_rows, built)
        with contextlib.ExitStack() as stack:
            if "custom_dataset" not in {**content, **replaced}:
                stack.enter_context(quick_hub())
            spec = {**load_yaml(info.path), **replaced} if replaced else str(info.path)
            tasks = manager.load([spec])["tasks"]
    except BenchError:
        raise
    except Exception as error:
        raise DataError(_load_failure(info, content, error)) from error
    if len(tasks) != 1:
        raise UsageError(f"{info.name} is a group of {len(tasks)} tasks; name one of them")
    built += tasks.values()
    return built[0]


def _replaced_keys(
    info: SuiteInfo, content: Mapping[str, Any], data_dir: Path | None, skip_bad_rows: bool, built: Sequence[Any]
) -> dict[str, Any]:
    """Return the keys of a task file that are ours instead: where its rows are, and graders that it names."""
    replaced: dict[str, Any] = {}
    if "custom_dataset" not in content and "task" in content and isinstance(content["task"], str):
        found = local.from_files(info.name, info.path, content, skip_bad_rows)
        replaced |= found or local.from_folder(info.name, content, data_dir, skip_bad_rows) or {}
    grader = named.wanted(info.metadata, info.name)
    if grader is not None:
        # The task is not there yet; by the time that it grades, it is.
        replaced |= named.task_keys(*grader, target_of=lambda doc: _first(built[0].doc_to_target(doc)))
    return replaced


def _load_failure(info: SuiteInfo, content: Mapping[str, Any], error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, ConnectionError):
        folder = local.folder_names(info.name, content)[0]
        needed = " and ".join(f"{folder}/{split}.jsonl[.gz]" for split in local.needed_splits(content))
        return (
            f"no data for {info.name}: {reason.rstrip('.')}. Three ways out: a folder that holds {needed} given with "
            "--data-dir or FLASHMEM_DATA; a network connection; a filled datasets cache (HF_HOME)"
        )
    if _template_failure(error):
        return f"a template of {info.path} fails: {_template_failure(error)}; mend the suite file"
    return f"{info.name} could not be loaded ({info.path}): {type(error).__name__}: {reason}"


def _template_failure(error: Exception) -> str | None:
    """Return why a Jinja template failed, in a clause; None where the error is none of a template."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    if isinstance(error, SecurityError):
        return f"the sandbox that templates run in refuses it ({error.message})"
    return f"{type(error).__name__}: {error.message}" if isinstance(error, TemplateError) else None


@lru_cache(maxsize=1)
def _prepare_lm_eval() -> None:
    """Put lm-eval's templates into a sandbox and keep its loading remarks out of the log."""
    import lm_eval.utils

    from flashmem_bench.sandboxed import Sandbox

    sandbox = Sandbox()
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox
    for logger in ("lm_eval.api.task", "lm_eval.config.task"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _documents(task: Any, name: str, split: str) -> Sequence[Doc]:
    if split not in _SPLITS:
        raise UsageError(f"no split named {split!r}; the splits are {', '.join(_SPLITS)}")
    if split == "test":
        return task.eval_docs
    if split == "calibration" and "calibration" in task.dataset:
        docs = task.dataset["calibration"]
        return task.config.process_docs(docs) if task.config.process_docs else docs
    # Where a task has no test split, lm-eval tests on the validation split, which is then no longer free.
    free = task.has_validation_docs() and task.has_test_docs()
    if free and split in {"validation", "calibration"}:
        return task.validation_docs()
    if not task.has_training_docs():
        raise UsageError(f"{name} has no data for {split}; use another suite's checkpoint and threshold")
    docs = task.training_docs()
    return docs if free else _part(list(docs), split)


def _part(docs: list[Doc], split: str) -> list[Doc]:
    """Return the training rows less their end, or that end, lent to a task without rows for calibration."""
    cut = len(docs) - max(1, round(len(docs) * _BORROWED_SHARE))
    return docs[:cut] if split == "train" else docs[cut:]


def generation_args(given: Mapping[str, Any]) -> GenerationArgs:
    """Return the generation arguments of a task as the harness uses them."""
    budget = next(
        (given[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if given.get(key)),
        _DEFAULT_NEW_TOKENS,
    )
    until = given.get("until") or []
    sampling = given.get("do_sample", float(given.get("temperature") or 0.0) > 0)
    return GenerationArgs(
        max_new_tokens=int(budget),
        stop=(until,) if isinstance(until, str) else tuple(until),
        temperature=float(given.get("temperature") or 1.0) if sampling else 0.0,
        top_p=float(given.get("top_p") or 1.0),
    )


def _primary_metric(info: SuiteInfo, task: Any) -> str:
    """Return the metric the suite names, else accuracy or the first metric, under the first filter."""
    names = list(task.aggregation())
    metric = given.first_metric(names) if task.OUTPUT_TYPE in given.CHOICE_KINDS else names[0]
    first = f"{metric},{task._filters[0].name}"
    return str(info.metadata.get("primary_metric", first))


def _first(target: Any) -> str:
    """Return a target as text; of several right ones the first."""
    return str(target[0] if isinstance(target, list) and target else target)


def _extracted(filtered: Any) -> str | None:
    text = filtered if isinstance(filtered, str) else " ".join(str(part) for part in filtered)
    return text if text.strip() and text != NO_ANSWER else None


def _content_hash(
    info: SuiteInfo, content: Mapping[str, Any], task: Any, seed: int, settings: Mapping[str, Any] | None
) -> str:
    """Hash what can change a prompt or a grade: file, score, rows or their generator, versions."""
    from flashmem_bench.generators import GENERATORS

    spoken = {key: value for key, value in content.items() if key != "metadata"}
    parts: dict[str, Any] = {
        "file": spoken,
        "primary_metric": info.metadata.get("primary_metric"),
        "version": task.VERSION,
        "lm_eval": ".".join(version("lm-eval").split(".")[:2]),
    }
    if "grader" in info.metadata:
        parts["grader"] = named.wanted(info.metadata, info.name)
    if info.kind == "generated" and info.metadata["alias"] in GENERATORS:
        parts |= {"generator": _generator_code(info), "seed": seed, "settings": dict(settings or {})}
    else:
        parts["rows"] = _rows_hash(task.eval_docs)
        parts["code"] = _suite_code(info.path)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _generator_code(info: SuiteInfo) -> str:
    from flashmem_bench import generators

    folder = Path(generators.__file__).parent
    module = generators.GENERATORS[info.metadata["alias"]].rpartition(".")[2]
    files = [path for path in sorted(folder.glob("*.py")) if path.stem in {"__init__", "base", module}]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _suite_code(path: Path) -> str:
    """Hash the Python files beside a suite file that its functions come from."""
    modules = {path.parent / (name.rpartition(".")[0].replace(".", "/") + ".py") for name in function_names(path)}
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(modules) if file.is_file())).hexdigest()


def _rows_hash(docs: Sequence[Doc]) -> str:
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()
