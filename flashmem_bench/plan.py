"""What a recipe will take, before anything runs: hours, device memory and disk of each phase.

Everything follows from the shape of the backbone, the number of samples, the speed of the device and a few
assumptions that the recipe states under `plan` and that the plan prints beside its numbers. The formulas:

* a position costs 2 P floating-point operations forward, P the weights that it meets, plus 4 N H d_h T for attention
  over T positions;
* training runs the prefix forward once, and [M, y] forward and backward to its inputs (the frozen weights need no
  gradient): 4 P a position, 6 P when layers are run again; the memory's own parameters cost 6 a step and parameter;
* a decode step reads the weights and the cache once, at a share of the device's bandwidth, and launches its kernels;
* a method with memories costs the factor of `flashmem_bench.floor` more, by bytes.

Estimates of this kind are right within a factor of two; `plan.margin` is added to every time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flashmem_bench.claims import load_claims
from flashmem_bench.errors import BenchError
from flashmem_bench.floor import Shape, decode_floor
from flashmem_bench.models import BUNDLED
from flashmem_bench.recipes import Recipe, Samples
from flashmem_bench.registry import get_method, get_methods
from flashmem_bench.settings import resolve
from flashmem_bench.stats import minimum_detectable_difference, samples_for_margin

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
# Bytes a sample leaves in samples.jsonl and texts.jsonl, measured on gsm8k.
_ROW_BYTES, _TEXT_BYTES_A_TOKEN = 2_500, 60
_REPORT_S = 120.0
_VALIDATION_BATCH, _SELF_BATCH = 8, 16


@dataclass(frozen=True)
class Device:
    """Speed of a device.

    Attributes:
        tflops: 10^12 operations a second.
        bandwidth: 10^9 bytes a second.
        source: Whence known.
        launch_us: Microseconds to start a small operation; a GPU's where it was not measured.
    """

    tflops: float
    bandwidth: float
    source: str
    launch_us: float = 12.0


@dataclass(frozen=True)
class Phase:
    """One line of a plan.

    Attributes:
        phase: What is done.
        samples: How many samples it goes through.
        hours: With the margin.
        memory_gib: Peak on a device.
        disk_gib: What it writes at most.
        why: The arithmetic in a few words.
    """

    phase: str
    samples: int
    hours: float
    memory_gib: float
    disk_gib: float
    why: str


@dataclass(frozen=True)
class Costs:
    """Arithmetic of one recipe on one device."""

    recipe: Recipe
    shape: Shape
    tied: bool
    device: Device

    @property
    def weights(self) -> int:
        """Parameters of the backbone, norms and biases left out."""
        return self.shape.layers * self.shape.layer_weights + self.shape.vocabulary * self.shape.width * (2 - self.tied)

    @property
    def met(self) -> int:
        """Weights that a position meets: the layers and the head."""
        return self.shape.layers * self.shape.layer_weights + self.shape.vocabulary * self.shape.width

    @property
    def element(self) -> int:
        """Bytes of a weight."""
        return 4 if self.recipe.dtype == "auto" and self.recipe.model == BUNDLED else _BYTES[self.recipe.dtype]

    def memory(self, method: str = "flashmem") -> Any:
        """The settings of a method's memory under the recipe."""
        spec = get_method(method)
        own = {k: v for k, v in self.recipe.settings.items() if not k.startswith("suite.")}
        return resolve(own, fixed=spec.fixed, defaults=spec.defaults, method=method).memory

    def second_model(self, method: str) -> bool:
        """Whether a copy of the backbone stands beside it."""
        return self.memory(method).source in ("separate-encoder", "weaver")

    def learned(self, method: str) -> int:
        """Parameters that training fits.

        A consolidator has its blocks, the two maps of the seed and the output map; a separate encoder LoRA as well. A
        weaver has LoRA, two maps and two banks of queries, and `lora-sft` as many as a consolidator, in LoRA.
        """
        memory, width = self.memory(method), self.shape.width
        blocks = (memory.depth or self.shape.layers) * self.shape.block_weights + 3 * width**2
        heads = (self.shape.heads + self.shape.kv_heads) * self.shape.head_width
        adapters = (memory.encoder_layers or self.shape.layers) * (memory.encoder_rank or 0) * (2 * width + heads)
        match memory.source:
            case "separate-encoder":
                return blocks + adapters
            case "weaver":
                return adapters + 2 * width * (width + 1) + 2 * (memory.length + 2) * width + 2
            case "constant":
                return memory.length * width + (blocks if memory.reparam == "mlp" else 0)
            case _:
                return blocks

    def attention(self, context: float) -> float:
        """Operations of a position's attention over `context` positions."""
        return 4.0 * self.shape.layers * self.shape.heads * self.shape.head_width * context

    def cache_bytes(self, context: float) -> float:
        """Bytes of a row's keys and values."""
        return self.shape.layers * self.shape.cache(1) * context * self.element

    def prefill_s(self, tokens: float) -> float:
        """Seconds to encode a prompt."""
        operations = tokens * (2 * self.met + self.attention(tokens / 2))
        return operations / (self.device.tflops * 1e12 * self.recipe.plan.prefill_mfu)

    def step_s(self, context: float, batch: int) -> float:
        """Seconds of one decode step of a batch."""
        plan = self.recipe.plan
        moved = self.met * self.element + batch * self.cache_bytes(context)
        arithmetic = batch * 2 * self.met / (self.device.tflops * 1e12 * plan.prefill_mfu)
        launch = self.shape.layers * plan.launches_layer * self.device.launch_us / 1e6
        return max(moved / (self.device.bandwidth * 1e9 * plan.bandwidth_share), arithmetic, launch)

    def answer_s(self, batch: int, factor: float = 1.0) -> float:
        """Seconds a sample to answer, in batches; `factor` on the decode."""
        plan = self.recipe.plan
        context = plan.prompt_tokens + plan.answer_tokens / 2
        return self.prefill_s(plan.prompt_tokens) + factor * plan.answer_tokens * self.step_s(context, batch) / batch

    def training_flops(self, method: str) -> float:
        """Operations of one training example."""
        plan, length = self.recipe.plan, self.memory(method).length
        tail = length + plan.answer_tokens
        context = plan.prompt_tokens + tail / 2
        # Forward and backward; forward again for checkpointed layers, and for the plain pass that `keep` compares with.
        passes = 2 + self.recipe.train.activation_checkpointing + (self.recipe.train.keep > 0)
        prefix = plan.prompt_tokens * (2 * self.met + self.attention(plan.prompt_tokens / 2))
        encoder = 3 * prefix if self.second_model(method) else 0.0
        return (
            prefix
            + encoder
            + passes * tail * (2 * self.met + self.attention(context))
            + (6.0 * length * self.learned(method))
        )

    def decode_memory(self, batch: int, copies: int = 1) -> float:
        """Peak bytes of decoding."""
        plan = self.recipe.plan
        context = plan.prompt_tokens + plan.answer_tokens + self.memory().length * plan.triggers
        # A cache is made for the longest row, and moved a layer at a time for a longer one; logits are float32.
        return (
            copies * self.weights * self.element
            + 1.1 * batch * self.cache_bytes(context)
            + (8.0 * batch * self.shape.vocabulary)
        )

    def training_memory(self, method: str) -> float:
        """Peak bytes of one training process."""
        plan, train, shape = self.recipe.plan, self.recipe.train, self.shape
        rows = min(train.micro_batch_size or train.batch_size, train.batch_size)
        tail = self.memory(method).length + plan.answer_tokens
        # What autograd keeps of a layer and position: norms, q, k, v, output, and three times the FFN.
        layer = 6 * shape.width + 2 * shape.head_width * (shape.heads + 2 * shape.kv_heads) + 4 * shape.ffn
        kept = shape.layers * shape.width + layer if train.activation_checkpointing else shape.layers * layer
        cache = self.cache_bytes(plan.prompt_tokens + tail) * (1 if train.activation_checkpointing else 2)
        copies = 2 if self.second_model(method) else 1
        # float32: master, gradient, two moments. The logits stand there thrice: in the dtype, as float32, as gradient.
        return (
            copies * self.weights * self.element
            + 16.0 * self.learned(method)
            + rows * (cache + tail * kept * self.element)
            + rows * tail * shape.vocabulary * (self.element + 8.0)
        )


def make_plan(recipe: Recipe, shape: Shape, tied: bool, samples: Samples, device: Device) -> dict[str, Any]:
    """Return the whole plan as plain values.

    Args:
        recipe: What would run.
        shape: Of the backbone.
        tied: Whether input and output embeddings are one.
        samples: In the splits, all suites together.
        device: How fast it is.

    Returns:
        `phases`, `total`, `assumptions`, `samples`, `parameters`, `power` and `device`.
    """
    costs = Costs(recipe, shape, tied, device)
    phases = [*_sampling(costs, samples), *_trainings(costs, samples), _calibration(costs, samples)]
    phases += [*_arms(costs, samples), Phase("report", 0, _hours(costs, _REPORT_S), 0.0, 0.05, "tables and figures")]
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "phases": [asdict(phase) for phase in phases],
        "total": {
            "hours": sum(phase.hours for phase in phases),
            "memory_gib": max(phase.memory_gib for phase in phases),
            "disk_gib": sum(phase.disk_gib for phase in phases) + costs.weights * costs.element / _GIB,
        },
        "parameters": {"backbone": costs.weights, **{m: costs.learned(m) for m in recipe.train.methods}},
        "samples": samples.model_dump(),
        "device": asdict(device),
        "power": power(recipe, samples),
        "assumptions": assumptions(costs),
    }


def power(recipe: Recipe, samples: Samples) -> dict[str, Any]:
    """Return what the comparisons of a recipe can see, and the margins that its claims will be tested with.

    A paired test rests on the samples on which two methods differ; how many that will be is the recipe's guess.
    """
    each = samples.test // max(1, len(recipe.suites))
    n = min(each, recipe.run.limit or each)
    share = recipe.plan.discordant_share
    margins = {claim.id: claim.margin for claim in load_claims() if claim.test == "no-worse"}
    return {
        "samples_a_suite": n,
        "discordant_share": share,
        "minimum_detectable": minimum_detectable_difference(n, share),
        "margins": margins,
        "samples_for_margin": {name: samples_for_margin(margin, share) for name, margin in margins.items()},
    }


def assumptions(costs: Costs) -> list[str]:
    """Return what the numbers rest on, in sentences."""
    plan, device = costs.recipe.plan, costs.device
    size = costs.recipe.run.batch_size
    return [
        f"device: {device.tflops:.4g} TFLOP/s, {device.bandwidth:.4g} GB/s ({device.source})",
        f"shares of it reached: training {plan.train_mfu:.0%} of the FLOP/s, prefill {plan.prefill_mfu:.0%}, decoding "
        f"{plan.bandwidth_share:.0%} of the bandwidth; a step starts {plan.launches_layer:g} operations a layer, "
        f"{device.launch_us:.3g} us each",
        f"a prompt has {plan.prompt_tokens} tokens and an answer {plan.answer_tokens}; {plan.triggers:g} memories an "
        "answer",
        f"a position costs 2 x {costs.met / 1e9:.3g}e9 FLOPs forward, and {costs.attention(1):.3g} a position that it "
        "looks back on",
        *([f"runs: {size} samples at once, and a seat that is free is taken by the next one"] if size > 1 else []),
        "a training example: the prefix forward, and [M, y] forward and backward without gradients of the weights"
        + (", forward once more for the checkpointed layers" if costs.recipe.train.activation_checkpointing else ""),
        f"{plan.margin:.0%} is added to every time; disk includes the backbone's own files",
    ]


def _hours(costs: Costs, seconds: float) -> float:
    return seconds * (1 + costs.recipe.plan.margin) / 3600


def _sampling(costs: Costs, samples: Samples) -> list[Phase]:
    recipe = costs.recipe
    if recipe.targets != "self":
        return []
    train = min(samples.train, (recipe.train.examples or samples.train) * len(recipe.suites))
    held_out = min(recipe.train.early_stopping.examples, samples.validation) if recipe.train.early_stopping else 0
    number = train + held_out
    seconds = number * recipe.plan.draws * costs.answer_s(_SELF_BATCH) / recipe.placement.processes
    disk = number * recipe.plan.answer_tokens * 5 / _GIB
    why = f"{number} samples x {recipe.plan.draws:g} draws, {_SELF_BATCH} at once"
    memory = costs.decode_memory(_SELF_BATCH) / _GIB
    return [Phase("self-sampling", number, _hours(costs, seconds), memory, disk, why)]


def _trainings(costs: Costs, samples: Samples) -> list[Phase]:
    recipe, train = costs.recipe, costs.recipe.train
    found = []
    groups = len(recipe.suites) if train.scope == "suite" else 1
    per_memory = min(samples.train, (train.examples or samples.train) * len(recipe.suites)) // groups
    steps = train.steps or max(1, round(train.epochs * -(-per_memory // train.batch_size)))
    number = steps * train.batch_size
    for method in train.methods:
        rate = costs.device.tflops * 1e12 * recipe.plan.train_mfu * recipe.placement.processes
        seconds = number * costs.training_flops(method) / rate
        limited = train.minutes is not None
        seconds = 60 * train.minutes if train.minutes is not None else seconds
        checked = min(train.validation * len(recipe.suites), samples.validation) // groups
        seconds += 2 * checked * costs.answer_s(_VALIDATION_BATCH) / recipe.placement.processes
        learned = costs.learned(method)
        # State: parameters, two moments, the best ones, float32, written beside the old file; then the checkpoint.
        disk = (2 * 16.0 * learned + learned * costs.element) / _GIB
        why = f"stops after {train.minutes:g} minutes" if limited else f"{steps} steps of {train.batch_size}"
        why += f", {costs.training_flops(method) / 1e12:.3g} TFLOP an example, {learned / 1e6:.4g} M parameters learn"
        memory = costs.training_memory(method) / _GIB
        for seed in train.seeds:
            name = f"train {method} seed {seed}"
            found += [Phase(name, number, groups * _hours(costs, seconds), memory, groups * disk, why)]
    return found


def _calibration(costs: Costs, samples: Samples) -> Phase:
    recipe = costs.recipe
    number = min((recipe.calibrate.limit or samples.calibration) * len(recipe.suites), samples.calibration)
    seconds = number * costs.answer_s(1)
    return Phase(
        "calibrate",
        number,
        _hours(costs, seconds),
        costs.decode_memory(1) / _GIB,
        0.001,
        "plain greedy runs, one at once",
    )


def _arms(costs: Costs, samples: Samples) -> list[Phase]:
    recipe, plan = costs.recipe, costs.recipe.plan
    number = min((recipe.run.limit or samples.test) * len(recipe.suites), samples.test)
    floor = decode_floor(
        costs.shape,
        context=plan.prompt_tokens,
        text_tokens=plan.answer_tokens,
        injections=max(1, round(plan.triggers)),
        length=costs.memory().length,
        depth=costs.memory().depth or costs.shape.layers,
        element_bytes=costs.element,
    )
    found = []
    for spec in get_methods(recipe.run.methods):
        trained = spec.memory_of in recipe.train.methods
        times = len(recipe.run.seeds) * (len(recipe.train.seeds) if trained else 1)
        latents = spec.memory_of is not None and costs.memory(spec.name).source != "lora"
        factor = floor.bytes_ratio if latents else 1.0
        together = recipe.run.batch_size if spec.together else 1
        seconds = times * number * costs.answer_s(together, factor)
        second = latents and costs.second_model(spec.name)
        # What encodes the history again does so at each memory, but for `memgen-cached`; `memgen` does it twice.
        passes = {"memgen": 2 * plan.triggers, "memgen-cached": 1}.get(spec.name, plan.triggers) if second else 0
        seconds += times * number * passes * costs.prefill_s(plan.prompt_tokens + plan.answer_tokens / 2)
        copies = 2 if second else 1
        disk = times * number * (_ROW_BYTES + plan.answer_tokens * _TEXT_BYTES_A_TOKEN) / _GIB
        why = f"{times} x {number} samples" + (f", decode x {factor:.3g} by bytes" if latents else "")
        own = 4.0 * costs.learned(spec.name) if latents else 0.0
        memory = (costs.decode_memory(together, copies) + own) / _GIB
        found.append(Phase(f"run {spec.name}", times * number, _hours(costs, seconds), memory, disk, why))
    return found


def shape_of(recipe: Recipe) -> tuple[Shape, bool, str]:
    """Return the shape of the backbone, whether its embeddings are tied, and where that is known from.

    Raises:
        BenchError: The configuration cannot be had and the recipe has no `shape`.
    """
    from flashmem_bench.hub import quick_hub
    from flashmem_bench.models import bundled_weights

    try:
        from transformers import AutoConfig

        with quick_hub():
            name = bundled_weights() if recipe.model == BUNDLED else recipe.model
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return Shape.of(config), bool(config.tie_word_embeddings), "the model's config.json"
    except (OSError, ValueError) as error:
        if recipe.shape is None:
            raise BenchError(
                f"the configuration of {recipe.model} cannot be had; connect, or write its numbers under shape: in the "
                "recipe"
            ) from error
        numbers = recipe.shape.model_dump(exclude={"tied_embeddings"})
        return Shape(**numbers), recipe.shape.tied_embeddings, "shape: in the recipe"


def samples_of(recipe: Recipe, parts: Any) -> tuple[Samples, str]:
    """Count the samples of the recipe's suites; where their data is not here, take what the recipe says."""
    splits = ("train", "calibration", "validation", "test")
    try:
        suites = [parts.session((name,), ()).suite(name) for name in recipe.suites]
        counted = {split: sum(len(suite.samples(split)) for suite in suites) for split in splits}
        return Samples(**counted), "counted in the data"
    except BenchError:
        return recipe.plan.samples, "plan.samples in the recipe, since data is missing"


def measure_device(device: str, dtype: str) -> Device:
    """Measure this machine for about a second."""
    import torch

    from flashmem_bench.ceilings import measure_ceilings
    from flashmem_bench.models import pick_device, pick_dtype

    place = pick_device(device)
    found = measure_ceilings(place, getattr(torch, pick_dtype(dtype, place)))
    return Device(found.flops / 1e12, found.bytes_s / 1e9, f"measured here on {found.where}", found.launch_us)
