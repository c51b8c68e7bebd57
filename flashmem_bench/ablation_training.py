"""The memories of an ablation that changes the memory itself: one for every value, suite and training seed.

Each is trained on its suite alone, in the same minutes and with the same batches, as a recipe says, and lies below
`<results>/checkpoints/<model>/<suite>/ablations/<axis>/<value>/<method>`, so that the same command trains none of them
twice. It is measured whatever harm it does: an ablation wants to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashmem_bench.errors import UnknownNameError
from flashmem_bench.models import BUNDLED, model_key
from flashmem_bench.recipes import Recipe, load_recipe
from flashmem_bench.registry import get_method
from flashmem_bench.reproduce import Parts, Place, Training, train_all

if TYPE_CHECKING:
    from flashmem_bench.ablations import Axis, Point
    from flashmem_bench.fitting import FitResult, Watcher
    from flashmem_bench.session import Session

DEFAULT_MINUTES = 5.0


@dataclass(frozen=True)
class Schedule:
    """How the memories of an ablation are trained.

    Attributes:
        minutes: Of each.
        recipe: Name or path of the recipe that has the rest; None = the bundled one for the suite, else the defaults.
    """

    minutes: float = DEFAULT_MINUTES
    recipe: str | None = None


def train_point(
    session: Session, axis: Axis, point: Point, suite: str, method: str, seed: int, schedule: Schedule, watcher: Watcher
) -> FitResult:
    """Train the memory of one value, unless it is there already.

    Args:
        session: Of the command; its backbone and suites are used.
        axis: The axis.
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
        "train.minutes": schedule.minutes,
        **{f"train.{name}": value for name, value in point.train.items()},
    }
    base = base_recipe(request.model, suite, schedule.recipe)
    values["settings"] = {**base.settings, **values["settings"]}
    place = Place(request.results_dir, request.data_dir, request.skip_bad_rows, request.trust_suite, request.command)
    parts = Parts(base.with_values(values), place)
    parts.share(session)
    folder = point_folder(request.results_dir, request.model, suite, axis.name, point.text, method, seed)
    ((_, result),) = train_all(parts, [Training(method, (suite,), seed, folder)], watcher)
    return result


def base_recipe(model: str, suite: str, named: str | None) -> Recipe:
    """Return the recipe that an ablation starts from.

    Raises:
        UsageError: The named one does not exist.
    """
    if named is not None:
        return load_recipe(named)
    if model == BUNDLED:
        try:
            return load_recipe(f"{BUNDLED}-{suite}")
        except UnknownNameError:
            pass
    return Recipe()


def point_folder(results: Path, model: str, suite: str, axis: str, value: str, method: str, seed: int) -> Path:
    """Return where the memory of a value lies."""
    own = results / "checkpoints" / model_key(model) / suite.replace("/", "--") / "ablations"
    return own / axis / value / method / f"seed{seed}"


def trained_method(method: str) -> str:
    """Return the method whose memory another one uses."""
    return get_method(method).memory_of or method
