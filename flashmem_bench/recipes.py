"""Recipes: one YAML file that says everything about a training and the comparison that follows it.

A recipe names the backbone, the suites, how memories are trained, calibrated and run, and what `plan` may assume. The
same file serves `train --recipe`, `plan` and `reproduce`. The ones that come with the package lie in `_recipes` of the
installed package or in `recipes` of the source tree and are found by name; any other is given by its path.

Every value is checked when the file is read: an unknown key names its nearest neighbours, a bad value what is allowed.
A recipe is data: nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flashmem_bench.bounded_yaml import load_bounded, read_bounded
from flashmem_bench.errors import UnknownNameError, UsageError
from flashmem_bench.models import BUNDLED
from flashmem_bench.settings import SUITE_PREFIX, check_value

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(_Part):
    """Where the backbone is: `processes` copies that share each training step, each on one device or spread."""

    processes: Count = 1
    map: Literal["single", "auto"] = "single"

    @model_validator(mode="after")
    def _check_both(self) -> Placement:
        if self.processes > 1 and self.map == "auto":
            raise ValueError("cannot both spread a backbone over all devices (map: auto) and copy it (processes)")
        return self


class EarlyStop(_Part):
    """Held-out loss every so many steps, and how often it may fail to fall."""

    every: Count
    patience: Count | None = None
    examples: Count = 256


class Train(_Part):
    """How memories are fitted.

    Attributes:
        methods: Whose memories.
        seeds: One memory for each.
        scope: joint makes one memory for all suites, suite one for each.
        targets: gold or self; None = gold for the bundled model, self for others.
        lessons: Shares of the training at which the next lesson of a suite that has lessons begins; none = no lessons.
        horizon: Target tokens after a memory that count; None = all of them.
        keep: Weight of leaving alone what the plain backbone gets right (see `flashmem.TrainConfig`).
        batch_size: Examples a step, over all processes.
        micro_batch_size: Examples that a process computes at once.
        batching: Who shares a step: random, or length for examples of similar length.
        prefix_gib: Room to keep encoded prompts from one epoch to the next; it saves most of a step where they fit.
        epochs: Passes over the examples, unless `steps` or `minutes` is given; `minutes` wins over both.
        validation: Samples a suite on which harm and gain are measured.
        examples: Training samples a suite at most.
        out: Root of the checkpoints, `<out>/<suite or joint>/<method>/seed<k>`; None = below the results folder.
    """

    methods: Names = ("flashmem",)
    seeds: Seeds = (0,)
    scope: Literal["joint", "suite"] = "joint"
    targets: Literal["gold", "self"] | None = None
    insertion: Literal["prompt-end", "mixed", "firing", "delimiters"] = "prompt-end"
    keep: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    lessons: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    horizon: Count | None = None
    lr: Positive = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Positive = 0.53
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    batch_size: Count = 64
    micro_batch_size: Count | None = None
    epochs: Positive = 5.0
    steps: Count | None = None
    minutes: Positive | None = None
    activation_checkpointing: bool = False
    batching: Literal["random", "length"] = "random"
    prefix_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    validation: Count = 200
    early_stopping: EarlyStop | None = None
    examples: Count | None = None
    provisional: bool = False
    out: Path | None = None


class Calibrate(_Part):
    """How thresholds are measured."""

    limit: Count | None = 100
    seed: Annotated[int, Field(ge=0)] = 0
    joint: bool = False
    out: Path | None = None


class Run(_Part):
    """Which arms are compared, on how many samples of each suite; `seeds` are those of sampling and random controls.

    A method with a memory runs once for each training seed that the recipe has for it.
    """

    methods: Names = ("vanilla", "flashmem")
    limit: Count | None = None
    batch_size: Count = 1
    seeds: Seeds = (0,)


class Samples(_Part):
    """Samples of all suites together, for a plan made where the data is not."""

    train: Count = 1000
    calibration: Count = 100
    validation: Count = 100
    test: Count = 1000


class Plan(_Part):
    """What a plan assumes; everything here is a guess that the user may replace.

    Attributes:
        margin: Share added to every time.
        prompt_tokens: Of a prompt, template included.
        answer_tokens: Of an answer.
        draws: Answers sampled for a right one.
        triggers: Memories an answer.
        train_mfu: Share of the device's FLOP/s that training reaches.
        prefill_mfu: The same of encoding prompts.
        bandwidth_share: Share of its bandwidth that decoding reaches.
        launches_layer: Operations that eager execution starts one after the other for a layer of a decode step.
        discordant_share: Share of the samples that two compared methods do not both get right or both wrong.
        samples: Numbers of samples where the data is not here.
    """

    margin: Annotated[float, Field(ge=0)] = 0.25
    prompt_tokens: Count = 150
    answer_tokens: Count = 200
    draws: Annotated[float, Field(ge=1)] = 2.0
    triggers: Annotated[float, Field(ge=0)] = 4.0
    train_mfu: Annotated[float, Field(gt=0, le=1)] = 0.3
    prefill_mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    bandwidth_share: Annotated[float, Field(gt=0, le=1)] = 0.6
    launches_layer: Annotated[float, Field(ge=0)] = 60.0
    discordant_share: Annotated[float, Field(gt=0, le=1)] = 0.15
    samples: Samples = Samples()


class ModelShape(_Part):
    """The backbone's configuration in numbers, for a plan made where it cannot be looked up."""

    layers: Count
    width: Count
    heads: Count
    kv_heads: Count
    head_width: Count
    ffn: Count
    vocabulary: Count
    tied_embeddings: bool = False


class Recipe(_Part):
    """A whole recipe; `name` is the file's."""

    name: str = "recipe"
    description: str = ""
    model: str = BUNDLED
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    placement: Placement = Placement()
    suites: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    train: Train = Train()
    calibrate: Calibrate = Calibrate()
    run: Run = Run()
    plan: Plan = Plan()
    shape: ModelShape | None = None

    @model_validator(mode="after")
    def _check_settings(self) -> Recipe:
        for key, value in self.settings.items():
            if not key.startswith(SUITE_PREFIX):
                self.settings[key] = check_value(key, value)
        return self

    @property
    def targets(self) -> str:
        """Where targets come from: as asked, else gold for the bundled model (seldom right) and self for others."""
        return self.train.targets or ("gold" if self.model == BUNDLED else "self")

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other values at dotted keys.

        Raises:
            UsageError: A value that is not allowed there.
        """
        document = self.model_dump()
        for key, value in values.items():
            *groups, last = key.split(".")
            target = document
            for group in groups:
                target = target[group]
            target[last] = value
        return _validated(document, self.name)


def recipes_dir() -> Path:
    """Return the folder of the recipes that come with the package, or of the source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given by name or path.

    Raises:
        UnknownNameError: No shipped recipe has that name.
        UsageError: There is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no recipe file at {name}; give a path, or the name of a shipped recipe")
        return path
    shipped = {path.stem: path for path in recipes_dir().glob("*.yaml")}
    if name not in shipped:
        raise UnknownNameError("recipe", name, shipped)
    return shipped[name]


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name or path.

    Raises:
        UsageError: It does not exist, is not YAML, or says something that is not allowed.
    """
    path = find_recipe(name)
    try:
        document = load_bounded(read_bounded(path), yaml.SafeLoader)
    except (OSError, ValueError) as error:
        raise UsageError(f"the recipe {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UsageError(f"the recipe {path} must be a mapping with model, suites, train and so on")
    return _validated({"name": path.stem, **document}, str(path))


def _validated(document: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _sentence(error.errors()[0], where) from None


def _sentence(problem: Any, where: str) -> UsageError:
    """Turn the first problem that pydantic found into one sentence."""
    parts = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        groups, name = parts[:-1], parts[-1]
        prefix = "".join(f"{group}." for group in groups)
        return UnknownNameError("recipe key", prefix + name, [prefix + key for key in _keys(groups)])
    if problem["type"] == "value_error":
        return UsageError(f"{where}: {'.'.join(parts)} {problem['ctx']['error']}")
    meant = problem["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
    given = "" if problem["type"] == "missing" else f", not {problem['input']!r}"
    return UsageError(f"{where}: {'.'.join(parts)} {meant}{given}")


def _keys(groups: list[str]) -> list[str]:
    """Return the keys that a group of the recipe has."""
    document: dict[str, Any] = Recipe.model_json_schema()
    known = document
    for group in groups:
        known = known["properties"][group]
        options = [known, *known.get("anyOf", []), *known.get("allOf", [])]
        reference = next(option["$ref"] for option in options if "$ref" in option)
        known = document["$defs"][reference.rsplit("/", 1)[-1]]
    return list(known["properties"])
