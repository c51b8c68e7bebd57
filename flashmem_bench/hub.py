"""Data from the `datasets` cache or the Hugging Face hub, without long waits.

Offline, `datasets` retries every request for about half a minute before it gives up. A compute node without
internet is an ordinary place to run this harness, so the hub is first asked for a sign of life, with a
deadline; without one the download runs in offline mode, which finds a filled cache or fails at once. The
two flags that mean "offline" are put back afterwards.

Nothing is substituted: a dataset that cannot be had is an error of the caller's making.
"""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

DEADLINE_S = 3.0
# A gateway that answers so does not let the request through to the hub.
_BLOCKED = {403, 407}


class HubError(Exception):
    """The dataset is neither in the cache nor to be had from the hub; the message says why, in a clause."""


class NotOnHubError(HubError):
    """The dataset is on no hub; the message says where its files come from, in a clause."""


def hub_reachable(deadline_s: float = DEADLINE_S) -> bool:
    """Return whether the hub answers within `deadline_s` seconds, name resolution included."""
    if any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return False
    answers: list[bool] = []
    # A thread, because no timeout of a socket covers a name server that does not answer.
    probe = threading.Thread(target=lambda: answers.append(_answers(deadline_s)), daemon=True)
    probe.start()
    probe.join(deadline_s)
    return bool(answers and answers[0])


def _answers(deadline_s: float) -> bool:
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=deadline_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in _BLOCKED
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def quick_hub() -> Iterator[bool]:
    """Make `datasets` fail at once where the hub does not answer; yields whether it does."""
    import datasets
    import huggingface_hub.constants

    reachable = hub_reachable()
    homes: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home in homes:
            home.HF_HUB_OFFLINE = home.HF_HUB_OFFLINE or not reachable
        yield reachable
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def hub_rows(repo: str, config: str | None, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split of a hub dataset, from the cache or the network.

    Raises:
        HubError: It can be had from neither.
    """
    import datasets

    with quick_hub() as reachable:
        try:
            return datasets.load_dataset(repo, config, split=split).to_list()
        except Exception as error:
            raise HubError(_why(repo, reachable, error)) from error


def _why(repo: str, reachable: bool, error: Exception) -> str:
    if "script" in str(error).lower():
        return f"{repo} exists only as a loading script, which the installed `datasets` no longer runs"
    if not reachable:
        return f"the hub cannot be reached and {repo} is not in the datasets cache"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{repo} could not be loaded from the hub: {reason}"
