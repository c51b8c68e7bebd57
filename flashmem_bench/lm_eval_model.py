"""Our methods as a model of lm-eval: `lm_eval.simple_evaluate(model=FlashMemLM(method="flashmem"), ...)`.

lm-eval asks for texts and likelihoods; what answers is the method that `flashmem-bench run` would build, found and
prepared the same way: trained memory, threshold, settings. Which of them apply is decided for each task:
`flashmem_hops` is our suite `hops`, any other task `lm-eval/<task>`, unless `suite` names one for all. What lm-eval
does not ask for, triggers and encoded positions, is in `generations` after each call.

`python -m flashmem_bench.lm_eval_model --model flashmem --model_args method=flashmem ...` is lm-eval's own command line
with this model known to it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Registering a model first would keep lm-eval from filling its registry with its own.
import lm_eval.models  # noqa: F401
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from flashmem_bench.answers import by_key, streams
from flashmem_bench.errors import DataError, UsageError
from flashmem_bench.likelihood import Encoded, cannot_score, encode_pairs, judge, without_context
from flashmem_bench.methods.base import Entry
from flashmem_bench.models import BUNDLED, model_key
from flashmem_bench.prepare import Prepared, prepare
from flashmem_bench.registry import get_method
from flashmem_bench.rows import fit_prompt
from flashmem_bench.samples import GenerationArgs, Sample, sample_seed
from flashmem_bench.session import Request, Session
from flashmem_bench.settings import parse_assignments
from flashmem_bench.suites import SuiteInfo, find_suite
from flashmem_bench.tasks import generation_args, memory_defaults

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from flashmem.backbone import Backbone
    from flashmem.generation import Generation

_log = logging.getLogger(__name__)
_OURS = "flashmem_"


@dataclass
class TaskOfOthers:
    """What preparing a method asks of a suite, for a task whose documents lm-eval keeps to itself.

    Attributes:
        name: Name of the suite whose memory and threshold are looked for.
        generation: How lm-eval wants completions generated.
        memory_defaults: The suite's own settings as dotted `--set` keys.
    """

    name: str
    generation: GenerationArgs
    memory_defaults: dict[str, Any] = field(default_factory=dict)
    content_hash: str = ""
    bad_rows: int = 0
    primary_metric: str = ""
    calibrate_by: str | None = None
    prefix_field: str | None = None

    def samples(self, split: str = "test") -> Sequence[Sample]:
        """Refuse: the documents are lm-eval's."""
        raise UsageError(
            f"the samples of {self.name} are needed here; run it with flashmem-bench run --suite {self.name}"
        )


@register_model("flashmem")
class FlashMemLM(LM):
    """A method of this harness behind lm-eval's interface.

    Args:
        model: Backbone: `flashmem-tiny`, a folder or a hub id.
        method: Name of the method.
        suite: Whose memory and threshold are used for every task; by default each task's own.
        checkpoint: Trained memory, a folder or a hub id; by default the usual search.
        device: Torch device, or auto; lm-eval's command line says cuda:0 unasked, so without a GPU that means auto.
        dtype: Name of a torch dtype, or auto.
        settings: Dotted `--set` keys and values, or the same as text, `key=value` separated by semicolons.
        results_dir: Where trained memories and thresholds are.
        data_dir: Data folder; only placebos that need memories of other samples read it.
        truncate: How a prompt that is too long is cut: left, as lm-eval does, middle, or None to refuse it.
        seed: Seed of sampling and random controls.
        batch_size: Prompts answered together; one that is finished makes room for the next.
        max_batch_size: Accepted from lm-eval and not used.
        backbone: A backbone that is already loaded.
    """

    def __init__(
        self,
        model: str = BUNDLED,
        method: str = "flashmem",
        suite: str | None = None,
        checkpoint: str | None = None,
        device: str | None = "auto",
        dtype: str = "auto",
        settings: Mapping[str, Any] | str | None = None,
        results_dir: str | Path = "results",
        data_dir: str | Path | None = None,
        truncate: str | None = "left",
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        backbone: Backbone | None = None,
    ):
        super().__init__()
        spec = get_method(method)
        if spec.reference is not None:
            raise UsageError(
                f"{method} is matched to a {spec.reference} cell, which lm-eval has not; run it with flashmem-bench run"
            )
        texts = settings.split(";") if isinstance(settings, str) else [f"{k}={v}" for k, v in (settings or {}).items()]
        request = Request(
            suites=(),
            methods=(method,),
            model=model,
            seed=int(seed),
            # lm-eval's "auto" looks for what fits; one always does.
            batch_size=1 if batch_size == "auto" else int(batch_size),
            device=_device(device),
            dtype=dtype,
            data_dir=Path(data_dir) if data_dir else None,
            results_dir=Path(results_dir),
            checkpoint=checkpoint,
            settings=parse_assignments(texts),
            truncate=truncate,
        )
        self.method, self.suite = method, suite
        self.session = Session(request, backbone)
        self.generations: list[Generation] = []
        self._spec = spec
        self._prepared: dict[tuple[str, GenerationArgs], tuple[Prepared, Any]] = {}
        self._device = self.backbone.device

    @property
    def backbone(self) -> Backbone:
        """The frozen model."""
        return self.session.backbone

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.backbone.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches requests."""
        return model_key(self.session.request.model)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template that `apply_chat_template` uses; None where it is switched off."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the text that the backbone expects.

        Raises:
            UsageError: The tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise UsageError(f"{self.backbone.name} has no chat template; leave --apply_chat_template out")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str) -> list[int]:
        """Return token ids with the special tokens of a prompt, unless the text begins with one already."""
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        if first and string.startswith(first):
            return self.backbone.encode(string)
        return self.tokenizer.encode(string)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return one completion a request, in their order, cut before the first stop string."""
        found: dict[int, Generation] = {}
        for key, places in _runs(requests, lambda request: (self._suite_of(request), _arguments(request))):
            prepared, method = self._method(*key)
            answer = self._stream if streams(method, self.session.request) else self._in_groups
            for place, record in answer(prepared, method, requests, places):
                found[place] = record
                self.cache_hook.add_partial("generate_until", requests[place].args, record.text)
        self.generations = [found[place] for place in range(len(requests))]
        return [record.text for record in self.generations]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return `(log-likelihood, greedy)` of each continuation; those of one context share its pass and its memory.

        Raises:
            UsageError: The method cannot judge given answers.
        """
        self.generations = []
        results: list[tuple[float, bool]] = []
        for (name, context), places in _runs(requests, lambda request: (self._suite_of(request), request.args[0])):
            _, method = self._method(name, GenerationArgs(1, ()))
            if not self._spec.judges:
                raise cannot_score(self.method, name)
            scores = judge(
                method, self._encode(context, [requests[place].args[1] for place in places]),
                _sample(requests[places[0]], places[0]), plain=not context,
            )  # fmt: skip
            self.generations.append(scores.generation)
            for place, answer in zip(places, zip(scores.log_likelihoods, scores.greedy, strict=True), strict=True):
                results.append(answer)
                self.cache_hook.add_partial("loglikelihood", requests[place].args, answer)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse: a whole text has no prompt, and so no place for a memory."""
        raise NotImplementedError(
            "a task that scores whole texts has no prompt and so no place for a memory; use lm-eval's model hf for it"
        )

    def _encode(self, context: str, continuations: list[str]) -> Encoded:
        if not context:
            return without_context(self.backbone, continuations)
        encoded = encode_pairs(self.tok_encode, context, continuations)
        longest = max(map(len, encoded.continuations))
        prompt = fit_prompt(self.backbone, encoded.prompt, self.session.request.truncate, longest)
        self._tell(prompt.truncated)
        return replace(encoded, prompt=prompt.ids)

    def _stream(
        self, prepared: Prepared, method: Any, requests: list[Instance], places: Sequence[int]
    ) -> Iterator[tuple[int, Generation]]:
        """Yield `(place, record)` as answers are finished."""
        entries = (self._entry(prepared, requests, place) for place in places)
        for number, record in method.stream(entries, None, self.session.request.batch_size):
            yield places[number], record

    def _in_groups(
        self, prepared: Prepared, method: Any, requests: list[Instance], places: Sequence[int]
    ) -> Iterator[tuple[int, Generation]]:
        for group in self._batches(method, requests, places):
            entries = [self._entry(prepared, requests, place) for place, _ in group]
            prompts, samples = [entry.prompt for entry in entries], [entry.sample for entry in entries]
            records = method.generate(prompts, samples, None, entries[0].seed)
            yield from zip([place for place, _ in group], records, strict=True)

    def _entry(self, prepared: Prepared, requests: list[Instance], place: int) -> Entry:
        budget, truncate = prepared.context.generation["max_new_tokens"], self.session.request.truncate
        prompt = fit_prompt(self.backbone, self.tok_encode(requests[place].args[0]), truncate, budget)
        self._tell(prompt.truncated)
        sample, times = _sample(requests[place], place), _repeats(requests, place)
        name = f"{sample.sample_id}/{times}" if times else sample.sample_id
        return Entry(prompt.ids, sample, sample_seed(self.session.request.seed, name))

    def _tell(self, truncated: bool) -> None:
        if truncated:
            _log.warning("a prompt was cut on the %s to fit the backbone", self.session.request.truncate)

    def _batches(
        self, method: Any, requests: list[Instance], places: Sequence[int]
    ) -> Iterator[list[tuple[int, Sample]]]:
        size = self.session.request.batch_size
        for start in range(0, len(places), size):
            yield from by_key(
                method, [(place, _sample(requests[place], place)) for place in places[start : start + size]]
            )

    def _suite_of(self, request: Instance) -> str:
        if self.suite is not None:
            return self.suite
        task = str(request.task_name or "unnamed")
        return task.removeprefix(_OURS) if task.startswith(_OURS) else f"lm-eval/{task}"

    def _method(self, name: str, generation: GenerationArgs) -> tuple[Prepared, Any]:
        """Prepare and build the method for one suite and one way to generate, once."""
        key = (name, generation)
        if key not in self._prepared:
            request = self.session.request
            suite = self._stand_in(name, generation)
            session = Session(replace(request, suites=(name,)), self.backbone, {name: suite})  # type: ignore[dict-item]
            prepared = prepare(session, name, self.method, note=_log.warning)
            self._prepared[key] = prepared, self._spec.make(prepared.context)
        return self._prepared[key]

    def _stand_in(self, name: str, generation: GenerationArgs) -> Any:
        if self._spec.needs_bank:
            return self.session.suite(name)
        info = _info(name)
        return TaskOfOthers(name, generation, memory_defaults(info.metadata) if info else {})


def _device(device: str | None) -> str:
    import torch

    return "auto" if device is None or (device == "cuda:0" and not torch.cuda.is_available()) else device


def _info(name: str) -> SuiteInfo | None:
    try:
        return find_suite(name)
    except (UsageError, DataError):
        return None


def _arguments(request: Instance) -> GenerationArgs:
    return generation_args(request.args[1])


def _runs(requests: Sequence[Any], key_of: Any) -> Iterator[tuple[Any, list[int]]]:
    """Yield neighbouring requests that share a key, as `(key, their places)`."""
    places: list[int] = []
    for place, request in enumerate(requests):
        if places and key_of(requests[places[-1]]) != key_of(request):
            yield key_of(requests[places[-1]]), places
            places = []
        places.append(place)
    if places:
        yield key_of(requests[places[-1]]), places


def _repeats(requests: Sequence[Any], place: int) -> int:
    """Return how many times the request at a place stands right before it: a task may want several draws."""
    start = place
    while start > 0 and requests[start - 1] is requests[place]:
        start -= 1
    return place - start


def _sample(request: Instance, place: int) -> Sample:
    """Return what a method may want to know of a request."""
    doc = request.doc if isinstance(request.doc, dict) else {}
    number = place if request.doc_id is None else request.doc_id
    stratum = doc.get("stratum")
    return Sample(
        sample_id=str(doc.get("id") or f"{request.task_name}-{number}"),
        prompt=str(request.args[0]),
        target="",
        answer=str(doc["gold"]) if doc.get("gold") is not None else json.dumps(doc, sort_keys=True, default=str),
        stratum=str(stratum) if stratum is not None else None,
        doc=doc,
    )


def main() -> None:
    """Run lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
