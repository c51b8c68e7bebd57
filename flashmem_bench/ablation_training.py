"""The memories of an ablation that changes the memory itself: one for every value, suite and training seed.

Each is trained on its suite alone, in the same minutes and with the same batches, as a recipe says, and lies below
`<results>/checkpoints/<model>/<suite>/ablations`, in a folder named by what sets it apart from the recipe. So no
command trains it twice, and axes that agree at a value, as most do at their reference, share one memory. It is measured
whatever harm it does: an ablation wants to know.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmem_bench.checkpoints import checkpoint_root
from flashmem_bench.errors import UnknownNameError
from flashmem_bench.models import BUNDLED
from flashmem_bench.places import folder_name
from flashmem_bench.recipes import Recipe, load_recipe
from flashmem_bench.registry import get_method
from flashmem_bench.reproduce import Parts, Place, Training, train_all
from flashmem_bench.settings import resolve

if TYPE_CHECKING:
    from flashmem_bench.ablations import Point
    from flashmem_bench.fitting import FitResult, Watcher
    from flashmem_bench.session import Session

MOST_MINUTES = 5.0
# Parts of a recipe's training that say nothing of one memory, or nothing that changes it.
_NO_MATTER = {
    "methods", "seeds", "scope", "out", "provisional", "micro_batch_size", "activation_checkpointing", "prefix_gib"
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How the memories of an ablation are trained.

    Attributes:
        minutes: Of each; None = as the recipe says, but no longer than `MOST_MINUTES`.
        recipe: Name or path of the recipe that has the rest; None = the bundled one for the suite, else the defaults.
    """

    minutes: float | None = None
    recipe: str | None = None

    def base(self, model: str, suite: str) -> Recipe:
        """Return the recipe that the ablations of a suite start from, with the length of a training in it.

        Raises:
            UsageError: The named one does not exist.
        """
        found = _base_recipe(model, suite, self.recipe)
        if self.minutes is None and found.train.steps and found.train.minutes is None:
            return found
        minutes = self.minutes or min(found.train.minutes or MOST_MINUTES, MOST_MINUTES)
        return found.with_values({"train.minutes": minutes})

    def length(self, model: str, suite: str) -> str:
        """Say how long a training is."""
        train = self.base(model, suite).train
        return f"{train.minutes:g} minutes" if train.minutes else f"{train.steps} steps"


def train_point(
    session: Session, point: Point, suite: str, method: str, seed: int, schedule: Schedule, watcher: Watcher
) -> FitResult:
    """Train the memory of one value, unless it is there already.

    Args:
        session: Of the command; its backbone and suites are used.
        point: The value.
        suite: On which suite.
        method: Whose memory: one that `train` fits.
        seed: Of the training.
        schedule: How.
        watcher: Told how far it is.
    """
    request = session.request
    settings = {**request.settings, **point.settings}
    values = {
        "model": request.model,
        "device": request.device,
        "dtype": request.dtype,
        "suites": [suite],
        "settings": {k: v for k, v in settings.items() if not k.startswith("trigger.")},
        **{f"train.{name}": value for name, value in point.train.items()},
    }
    base = schedule.base(request.model, suite)
    values["settings"] = {**base.settings, **values["settings"]}
    allowed = (request.allow_code_execution, request.allow_uncontained_code)
    where = (request.results_dir, request.data_dir, request.skip_bad_rows, request.trust_suite)
    place = Place(*where, request.command, *allowed)
    parts = Parts(base.with_values(values), place)
    parts.share(session)
    own = checkpoint_root(request.results_dir, request.model) / folder_name(suite) / "ablations"
    folder = own / memory_name(parts.recipe, base, method) / method / f"seed{seed}"
    ((_, result),) = train_all(parts, [Training(method, (suite,), seed, folder)], watcher)
    return result


def _base_recipe(model: str, suite: str, named: str | None) -> Recipe:
    if named is not None:
        return load_recipe(named)
    for bundled in (f"{BUNDLED}-{suite}-ablations", f"{BUNDLED}-{suite}") if model == BUNDLED else ():
        try:
            return load_recipe(bundled)
        except UnknownNameError:
            continue
    return Recipe()


def memory_name(recipe: Recipe, base: Recipe, method: str) -> str:
    """Name a memory by what its recipe changes in the one it started from, and by a digest of all that makes it."""
    made, usual = _what_makes(recipe, method), _what_makes(base, method)
    differences = [f"{key.rpartition('.')[2]}={value}" for key, value in made.items() if usual[key] != value]
    digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return "-".join([*differences, digest]).replace("/", "--")


def _what_makes(recipe: Recipe, method: str) -> dict[str, Any]:
    """Return everything of a recipe that a memory of a method depends on, seeds apart."""
    spec = get_method(method)
    settings = resolve(recipe.settings, fixed=spec.fixed, defaults=spec.defaults, method=method).flat()
    training = recipe.train.model_dump(mode="json", exclude=_NO_MATTER)
    return {
        **{key: value for key, value in settings.items() if key.startswith(("memory.", "monitor."))},
        **{f"train.{key}": value for key, value in training.items()},
        "train.targets": recipe.targets,
    }


def trained_method(method: str) -> str:
    """Return the method whose memory another one uses."""
    return get_method(method).memory_of or method
