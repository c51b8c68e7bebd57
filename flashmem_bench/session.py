"""What a command loads once and then shares: the request, the suites, the backbone, the store.

Loading is lazy and in the order in which mistakes are cheapest to find: names and settings first, then the results
folder, then the suites, and the backbone last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmem_bench.claims import pin
from flashmem_bench.errors import UsageError
from flashmem_bench.limits import Limits
from flashmem_bench.models import BUNDLED, load_backbone
from flashmem_bench.settings import Settings, split_suite_settings
from flashmem_bench.shards import Shard
from flashmem_bench.store import ResultStore

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem_bench.rows import Prompt
    from flashmem_bench.tasks import Suite

TRUNCATIONS = ("left", "middle")
MATCHES = ("within", "pooled")
EXECUTORS = ("local", "ray")
PLACEMENTS = ("single", "auto")


@dataclass(frozen=True)
class Request:
    """What the user asked for, with every default filled in.

    Attributes:
        suites: Names of suites.
        methods: Names of methods.
        limit: The first so many samples of each suite; None = all.
        limit_sessions: The samples of the first so many sessions; None = all.
        questions_per_session: The first so many samples of each session; None = all.
        prefix_reuse: Encode the history of a session once and fork it for each question.
        seed: Seed of sampling and of random controls.
        settings: Checked values of `--set`, dotted keys.
        placement: single, or auto to spread the backbone over the devices that there are.
        truncate: How a prompt beyond the positions is cut; None = it is an error.
        match: How a random trigger is matched to its flashmem cell.
        allow_code_execution: Grading may run programs that the model writes.
        allow_uncontained_code: It may do so where nothing keeps them in.
        shard: The part of the samples that is answered; None = all.
        rows_dir: Results folder for rows and banks; None = `results_dir`, where memories and thresholds always are.
        calibrate_missing: Measure a threshold that is not there, instead of refusing (ablations of the monitor).
        workers: Processes of this machine that answer.
        executor: local, or ray for the workers of a Ray cluster.
        ray_address: Of the cluster; auto finds the one of this machine.
        worker_cpus: CPUs of a worker of the cluster that has no GPU.
        limits: How long and how large samples may be, and how many may fail.
        command: The command line that continues this run.
    """

    suites: tuple[str, ...]
    methods: tuple[str, ...]
    model: str = BUNDLED
    limit: int | None = None
    limit_sessions: int | None = None
    questions_per_session: int | None = None
    prefix_reuse: bool = True
    seed: int = 0
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    placement: str = "single"
    data_dir: Path | None = None
    results_dir: Path = Path("results")
    checkpoint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    truncate: str | None = None
    match: str = "within"
    split: str = "test"
    skip_bad_rows: bool = False
    trust_suite: bool = False
    allow_code_execution: bool = False
    allow_uncontained_code: bool = False
    shard: Shard | None = None
    rows_dir: Path | None = None
    calibrate_missing: bool = False
    workers: int = 1
    executor: str = "local"
    ray_address: str = "auto"
    worker_cpus: int = 1
    limits: Limits = field(default_factory=Limits)
    command: str = ""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit must be 1 or more, not {self.limit}")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be 1 or more, not {self.batch_size}")
        if self.batch_size > 1 and (self.limit_sessions or self.questions_per_session):
            raise UsageError("--limit-sessions and --questions-per-session need --batch-size 1")
        if self.workers < 1:
            raise UsageError(f"--workers must be 1 or more, not {self.workers}")
        if self.executor not in EXECUTORS:
            raise UsageError(f"--executor must be local or ray, not {self.executor!r}")
        if self.executor == "ray" and (self.workers > 1 or self.limits.worker_memory is not None):
            raise UsageError(
                "--workers and --worker-memory are for processes of this machine; a Ray cluster has a worker on each "
                "GPU, or on each --worker-cpus CPUs"
            )
        if self.truncate is not None and self.truncate not in TRUNCATIONS:
            raise UsageError(f"--truncate must be left or middle, not {self.truncate!r}")
        if self.placement not in PLACEMENTS:
            raise UsageError(f"--placement must be single or auto, not {self.placement!r}")
        if self.match not in MATCHES:
            raise UsageError(f"--match must be within or pooled, not {self.match!r}")

    @property
    def in_processes(self) -> bool:
        """Whether other processes of this machine answer: there are several, or one that a limit can end."""
        return self.executor == "local" and (self.workers > 1 or self.limits.need_a_process)

    @property
    def own_dir(self) -> Path:
        """The results folder that this command writes."""
        return self.rows_dir if self.rows_dir is not None else self.results_dir


class Session:
    """Lazily loaded parts of one command.

    Args:
        request: What was asked for.
        backbone: A backbone that is already loaded; by default the request's model is loaded when first needed.
        suites: Suites that are already loaded, by name.
    """

    def __init__(self, request: Request, backbone: Backbone | None = None, suites: Mapping[str, Suite] | None = None):
        self.request = request
        self._backbone = backbone
        self._suites: dict[str, Suite] = dict(suites or {})
        self.prompts: dict[tuple[Any, ...], Prompt] = {}

    @cached_property
    def store(self) -> ResultStore:
        """The results folder; a new one fixes the margins of the claims before its first run."""
        store = ResultStore(self.request.own_dir)
        pin(store.root, datetime.now(UTC).isoformat(timespec="seconds"))
        return store

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        if self._backbone is None:
            self._backbone = load_backbone(
                self.request.model, self.request.device, self.request.dtype, self.request.placement
            )
        return self._backbone

    def suite(self, name: str) -> Suite:
        """Return a suite, loaded once."""
        if name not in self._suites:
            from flashmem_bench.tasks import load_suite

            generator, _ = split_suite_settings(self.request.settings)
            self._suites[name] = load_suite(
                name,
                data_dir=self.request.data_dir,
                skip_bad_rows=self.request.skip_bad_rows,
                trust_suite=self.request.trust_suite,
                settings=generator or None,
                allow_code=self.request.allow_code_execution,
                allow_uncontained=self.request.allow_uncontained_code,
            )
        return self._suites[name]

    def permit_code(self) -> None:
        """Refuse the request now, should it need to run programs later and nobody allowed that."""
        from flashmem_bench.grading.code import permit_code
        from flashmem_bench.suites import find_suite

        for name in self.request.suites:
            permit_code(find_suite(name), self.request.allow_code_execution, self.request.allow_uncontained_code)

    @property
    def method_settings(self) -> dict[str, Any]:
        """The values of `--set` that concern methods."""
        return split_suite_settings(self.request.settings)[1]


def generation_arguments(backbone: Backbone, suite: Suite, settings: Settings) -> dict[str, Any]:
    """Return the arguments of `transformers.GenerationConfig` for a suite under the settings."""
    wanted = suite.generation
    temperature = settings.sampling.temperature
    temperature = wanted.temperature if temperature is None else temperature
    eos = backbone.model.generation_config.eos_token_id
    eos = backbone.tokenizer.eos_token_id if eos is None else eos
    arguments: dict[str, Any] = {
        "max_new_tokens": wanted.max_new_tokens,
        "do_sample": temperature > 0,
        "eos_token_id": [eos] if isinstance(eos, int) else list(eos) if eos is not None else None,
        "pad_token_id": backbone.tokenizer.pad_token_id,
    }
    if temperature > 0:
        arguments.update(temperature=float(temperature), top_p=float(wanted.top_p))
    if wanted.stop:
        arguments["stop_strings"] = list(wanted.stop)
    return arguments
