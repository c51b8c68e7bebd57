"""Passes over rows of mixed lengths against each row alone, and the attention kernels behind them against plain masks.

The reference is always transformers' own model on the whole sequence of one row, without a cache.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM

from flashmem import attention, masks
from flashmem import backbone as backbone_module
from flashmem.backbone import Backbone
from flashmem.monitor import attention_rows, monitored_attention, row_entropy
from flashmem.slots import Slots
from flashmem.state import DecodeState
from tests.flashmem.conftest import (
    FAMILY_SETTINGS,
    SMALL,
    make_backbone,
    make_tokenizer,
    prompts_of,
    reference_model,
)

CPU = torch.device("cpu")


class Rows:
    """A batch under way and, beside it, what each row has been given so far."""

    def __init__(self, family: str, prompts: list[list[int]]) -> None:
        self.backbone, self.model = make_backbone(family), reference_model(family, "eager")
        self.backbone.observe(True)
        self.prompts = prompts
        self.embeds = [self.backbone.embed(torch.tensor([prompt]))[0] for prompt in prompts]
        self.latents = [torch.zeros(len(prompt), dtype=torch.bool) for prompt in prompts]
        self.state: DecodeState

    def prefill(self) -> None:
        self.state = self.backbone.prefill(self.prompts)

    def inject(self, takes: list[bool], seed: int, length: int = 3) -> None:
        memory = torch.randn(len(takes), length, self.backbone.hidden_size, generator=_seeded(seed)) * 0.3
        self.backbone.inject(self.state, memory, takes)
        for row, taken in enumerate(takes):
            if taken:
                self._given(row, memory[row], True)

    def append(self, rows: list[list[int]]) -> None:
        self.backbone.append(self.state, rows)
        for row, ids in enumerate(rows):
            if ids:
                self._given(row, self.backbone.embed(torch.tensor([ids]))[0], False)

    def step(self, tokens: list[int], rows: list[bool] | None = None) -> None:
        self.backbone.step(self.state, torch.tensor(tokens), rows)
        for row, token in enumerate(tokens):
            if rows is None or rows[row]:
                self._given(row, self.backbone.embed(torch.tensor([[token]]))[0], False)

    def _given(self, row: int, embeds: torch.Tensor, latent: bool) -> None:
        self.embeds[row] = torch.cat([self.embeds[row], embeds])
        self.latents[row] = torch.cat([self.latents[row], torch.full((len(embeds),), latent)])

    def check(self) -> None:
        """Logits, last hidden state and entropy of every row are those of the row alone."""
        state, layer = self.state, self.backbone.monitor_layer
        assert state.lengths == [len(row) for row in self.embeds] == state.next_position.tolist()
        for row, embeds in enumerate(self.embeds):
            alone = self.model(inputs_embeds=embeds[None], output_attentions=True, output_hidden_states=True)
            torch.testing.assert_close(state.logits[row], alone.logits[0, -1], rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(state.hidden[row], alone.hidden_states[-1][0, -1], rtol=1e-4, atol=2e-5)
            kept = alone.attentions[layer][0, :, -1, ~self.latents[row]][:, self.backbone.monitor.sinks :]
            wanted = float(scipy_entropy(kept.double().numpy(), axis=1).mean())
            assert float(state.entropy[row]) == pytest.approx(wanted, abs=1e-4)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Positions of all rows at once, the least of one row; None is one pass whatever its length.
CHUNKS = {"whole": (None, 256), "small": (21, 1), "one": (1, 1), "wide": (48, 16)}


def _cut(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, chunks: str) -> None:
    backbone.chunk, least = CHUNKS[chunks]
    monkeypatch.setattr(backbone_module, "_LEAST_CHUNK", least)


@pytest.mark.parametrize("chunks", ["whole", "small"])
@torch.no_grad()
def test_passes_of_mixed_rows_are_those_of_each_row_alone(family: str, chunks: str, monkeypatch) -> None:
    """Longer than every window, rows apart by more than a window, some injections, some rows standing still."""
    rows = Rows(family, prompts_of(40, 9, 23, 10))
    _cut(monkeypatch, rows.backbone, chunks)
    rows.prefill()
    rows.check()
    rows.inject([True, False, True, False], seed=1)
    rows.step([5, 6, 7, 8])
    rows.check()
    rows.append([[9, 10, 11], [], prompts_of(30)[0], [12]])
    rows.check()
    rows.step([5, 6, 7, 8], [False, True, False, True])
    rows.inject([False, True, False, False], seed=2, length=5)
    rows.append([[], prompts_of(17, seed=4)[0], [], [3, 4]])
    rows.inject([True, True, True, True], seed=3)
    rows.step([8, 9, 10, 11], [True, True, False, True])
    rows.check()


@pytest.mark.parametrize("chunks", list(CHUNKS))
@pytest.mark.parametrize("family_name", ["qwen2", "mistral", "gemma2"])
@torch.no_grad()
def test_chunks_of_every_size_leave_the_same(family_name: str, chunks: str, monkeypatch) -> None:
    rows = Rows(family_name, prompts_of(33, 32, 1, 5))
    _cut(monkeypatch, rows.backbone, chunks)
    rows.prefill()
    rows.check()
    # Rows of one length, behind a cache: no mask where there is full attention.
    rows.append([prompts_of(5)[0], prompts_of(6)[0], prompts_of(37)[0], prompts_of(33)[0]])
    assert rows.state.lengths == [38] * 4
    rows.append(prompts_of(*[19] * 4, seed=9))
    rows.check()


@torch.no_grad()
def test_appending_nothing_changes_nothing(family: str) -> None:
    rows = Rows(family, prompts_of(12, 5))
    rows.prefill()
    before = rows.state.logits.clone()
    rows.append([[], []])
    assert torch.equal(rows.state.logits, before) and rows.state.encoded == [12, 5]


def test_gradients_flow_through_mixed_rows_as_through_each_alone(family: str) -> None:
    """Latents of some rows and tokens behind them, over a cache without gradients."""
    backbone, prompts = make_backbone(family), prompts_of(18, 7, 13)
    memory = (torch.randn(3, 2, 32, generator=_seeded(0)) * 0.3).requires_grad_()
    ids, takes = torch.tensor(prompts_of(4, 4, 4, seed=1)), [True, False, True]
    counts, marks = [6, 0, 5], torch.tensor([[take] * 2 + [False] * 4 for take in takes])
    with torch.no_grad():
        state = backbone.prefill(prompts)
    embeds = torch.cat([memory, backbone.embed(ids)], 1)
    hidden = backbone.extend(state, embeds, counts=counts, latents=marks)
    assert state.lengths == [24, 7, 18]
    sum(hidden[row, :count].square().sum() for row, count in enumerate(counts)).backward()
    together, memory.grad = memory.grad.clone(), None
    for row in (0, 2):
        with torch.no_grad():
            alone = backbone.prefill([prompts[row]])
        part = backbone.extend(alone, torch.cat([memory, backbone.embed(ids)], 1)[row : row + 1, : counts[row]])
        torch.testing.assert_close(part[0], hidden[row, : counts[row]], rtol=1e-4, atol=1e-5)
        part.square().sum().backward()
    torch.testing.assert_close(together, memory.grad, rtol=1e-3, atol=1e-4)
    assert not together[1].any()
    # A pass without gradients goes on over what was put there.
    with torch.no_grad():
        backbone.step(state, torch.tensor([5, 6, 7]), takes)
        backbone.step(alone, torch.tensor([7]))
    torch.testing.assert_close(state.logits[2], alone.logits[0], rtol=1e-4, atol=1e-4)


def _heads(rows: int, length: int, heads: int, groups: int, seed: int = 0, batch: int = 2) -> list[torch.Tensor]:
    shapes = (batch, heads, rows, 8), (batch, groups, length, 8), (batch, groups, length, 8)
    return [torch.randn(shape, generator=_seeded(seed + i)).requires_grad_() for i, shape in enumerate(shapes)]


def _reference(query, key, value, mask, scaling: float) -> torch.Tensor:
    """`[B, Q, H, d_h]` with K and V repeated and the mask materialised."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def _agree(found, tensors, mask, scaling: float = 0.3) -> None:
    wanted = _reference(*tensors, mask, scaling)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(wanted.shape, generator=_seeded(9))
    ours = torch.autograd.grad((found * weight).sum(), tensors)
    theirs = torch.autograd.grad((wanted * weight).sum(), tensors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


HEADS = [(4, 4), (8, 2), (6, 1)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "length"), [(9, 9), (70, 70), (5, 12), (70, 100), (1, 12), (1, 1)])
def test_no_mask_is_causality_of_the_last_positions(heads: tuple[int, int], rows: int, length: int) -> None:
    tensors = _heads(rows, length, *heads)
    found = attention.attend(*tensors, attention.plain(CPU), 0.3, 0.0)
    _agree(found, tensors, torch.ones(rows, length, dtype=torch.bool).tril(length - rows))
    torch.testing.assert_close(attention.attend(*tensors, None, 0.3, 0.0), found)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 64, 65, 90])
def test_masked_attention_is_that_of_repeated_keys(heads: tuple[int, int], shared: bool, rows: int) -> None:
    tensors = _heads(rows, 100, *heads)
    mask = torch.rand(1 if shared else 2, 1, rows, 100, generator=_seeded(5)) < 0.4
    mask[..., 0] = True
    _agree(attention.attend(*tensors, mask, 0.3, 0.0), tensors, mask)


def test_folded_heads_are_queries_of_their_own_key_head() -> None:
    query = torch.arange(2 * 6 * 3).view(2, 6, 3, 1)
    folded = attention.fold(query, 2)
    assert folded.shape == (2, 2, 9, 1)
    assert folded[1, 1, :, 0].tolist() == query[1, 3:, :, 0].flatten().tolist()


def test_the_marker_is_told_apart_from_masks() -> None:
    assert attention.is_plain(None) and attention.is_plain(attention.plain(CPU))
    assert not attention.is_plain(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    # transformers passes on what has four dimensions.
    assert attention.plain(CPU).dim() == 4


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("rows", "length", "observed"), [(1, 9, 1), (7, 7, 1), (7, 7, 7), (4, 9, 3), (66, 80, 2)])
def test_the_monitored_layer_under_no_mask(softcap: float | None, rows: int, length: int, observed: int) -> None:
    """Output and entropies of the newest rows, whether the mask is made or not."""
    query, key, value = (tensor.detach() for tensor in _heads(rows, length, 8, 2))
    mask = torch.ones(1, 1, rows, length, dtype=torch.bool).tril(length - rows)
    found = []
    for given in (attention.plain(CPU), mask):
        layer = torch.nn.Module()
        tap = backbone_module.monitoring.attach(layer)
        tap.rows, tap.sinks = observed, 2
        output, _ = monitored_attention(layer, query, key, value, given, scaling=0.3, softcap=softcap)
        found.append((output, tap.entropy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    weights = attention_rows(query, key, mask, 0.3, softcap)
    torch.testing.assert_close(
        found[0][0], (weights.flatten(1, 2) @ value.repeat_interleave(4, 1)).transpose(1, 2), rtol=1e-5, atol=1e-6
    )
    rest = weights[..., -observed:, 2:].double()
    shares = rest / rest.sum(-1, keepdim=True)
    wanted = -(shares * shares.clamp_min(1e-300).log()).sum(-1).mean((1, 2))
    torch.testing.assert_close(found[0][1].double(), torch.nan_to_num(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at", [[0, 3], [2, 0]])
@pytest.mark.parametrize("masked", [True, False])
def test_the_observed_query_may_be_another_one_in_each_row(at: list[int], masked: bool) -> None:
    query, key, value = (tensor.detach() for tensor in _heads(4, 11, 4, 2))
    mask = torch.ones(1, 1, 4, 11, dtype=torch.bool).tril(7)
    layer = torch.nn.Module()
    tap = backbone_module.monitoring.attach(layer)
    tap.at = torch.tensor(at)
    monitored_attention(layer, query, key, value, mask if masked else attention.plain(CPU), scaling=0.3)
    whole = row_entropy(*(lambda x: (x, x.softmax(-1)))(_scores(query, key, mask)))
    assert tap.entropy.shape == (2, 1)
    torch.testing.assert_close(tap.entropy[:, 0], whole[torch.arange(2), torch.tensor(at)])


def _scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return backbone_module.monitoring.attention_scores(query, key, mask, 0.3)


def test_a_row_of_which_the_sinks_hold_almost_everything_has_a_true_entropy() -> None:
    """The rest is renormalised, however little it is; nothing at all is no entropy."""
    for sink in (0.0, 20.0, 60.0, 85.0, 200.0):
        scores = torch.tensor([sink, 1.0, 2.0, 0.5]).view(1, 1, 1, 1, 4) + 30
        found = float(row_entropy(scores, scores.softmax(-1), sinks=1))
        true = torch.distributions.Categorical(logits=torch.tensor([1.0, 2.0, 0.5])).entropy()
        assert found == pytest.approx(float(true), abs=1e-4) or (sink > 60 and found == 0.0)


@pytest.mark.parametrize("window", [None, 4, 50])
@pytest.mark.parametrize(
    ("slots", "width"),
    [
        (Slots(0, 6), 6),
        (Slots(9, 10), 1),
        (Slots(9, 14), 5),
        (Slots(None, 12, torch.tensor([[9, 10, 11], [2, 3, 4]])), 3),
        (Slots(None, 10, torch.tensor([[9], [0]])), 1),
    ],
)
def test_masks_of_a_pass_slot_by_slot(window: int | None, slots: Slots, width: int) -> None:
    mask = masks.pass_mask(slots, width, window, CPU, torch.float32)
    queries = slots.index.tolist() if slots.index is not None else [list(range(slots.start, slots.start + width))]
    wanted = [
        [[place <= at and (window is None or at - place < window) for place in range(slots.end)] for at in row]
        for row in queries
    ]
    if attention.is_plain(mask):
        causal = [[place <= slots.start + nth for place in range(slots.end)] for nth in range(width)]
        assert wanted == [causal] and slots.end == slots.start + width
    else:
        assert mask.shape == (len(queries), 1, width, slots.end)
        assert (mask[:, 0] == 0).tolist() == wanted
        assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}, "added, and finite"


def test_where_no_mask_is_needed_none_is_made() -> None:
    for slots, width in ((Slots(0, 6), 6), (Slots(9, 10), 1)):
        assert attention.is_plain(masks.pass_mask(slots, width, None, CPU, torch.float32))
        assert attention.is_plain(masks.pass_mask(slots, width, slots.end, CPU, torch.float32))
        assert not attention.is_plain(masks.pass_mask(slots, width, slots.end - 1, CPU, torch.float32))


class Made(TorchDispatchMode):
    """Sees every tensor that is made: its shape, and how many bytes are held at once.

    Only memory of its own counts, no view. In inference mode torch would hide what is made inside its own functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[str, tuple[int, ...]]] = set()
        self.held, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in _tensors((args, kwargs))}
        for leaf in _tensors(result):
            storage = leaf.untyped_storage()
            if storage.data_ptr() not in given and storage not in self.held:
                self.shapes.add((str(func), tuple(leaf.shape)))
                self.held[storage] = storage.nbytes()
        self.now = sum(self.held.values())
        self.peak = max(self.peak, self.now)
        return result

    def largest(self) -> int:
        return max(math.prod(shape) for _, shape in self.shapes)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _long_model(family: str):
    torch.manual_seed(7)
    settings = {**SMALL, **FAMILY_SETTINGS[family], "max_position_embeddings": 4096}
    # The pattern of Gemma 3 once: the last layer slides, the one before it does not.
    settings["num_hidden_layers"] = min(settings["num_hidden_layers"], 7)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32).eval()


def _long_backbone(family: str, monkeypatch: pytest.MonkeyPatch, chunk: int) -> Backbone:
    backbone = Backbone("long", _long_model(family), make_tokenizer())
    backbone.chunk = chunk
    monkeypatch.setattr(backbone_module, "_LEAST_CHUNK", 1)
    backbone.observe(True)
    return backbone


CHUNK = 80
LONG = (640, 1600)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family_name", ["qwen2", "mistral", "gemma3_text"])
@torch.no_grad()
def test_the_memory_of_a_prefill_grows_by_its_cache_and_one_mask(
    family_name: str, rows: int, uneven: bool, monkeypatch
) -> None:
    backbone, beside = _long_backbone(family_name, monkeypatch, CHUNK * rows), {}
    for length in LONG:
        state = backbone.prefill([[5 + row] * (9 * row + 1 if uneven else 1) for row in range(rows)], room=length)
        with Made() as made:
            backbone.append(state, prompts_of(*[length - 3 * row for row in range(rows)]))
        beside[length] = made.peak
        for name, shape in made.shapes:
            # Only rows of masks and scores are as long as the prompt, at most a chunk of them: it is never embedded,
            # copied or turned into logits as a whole.
            long = max(shape, default=0) >= length - 100
            assert not long or (shape[-1] == max(shape) and math.prod(shape[:-1]) <= rows * CHUNK), (name, shape)
            assert shape[-1:] != (backbone.config.vocab_size,) or math.prod(shape) == rows * shape[-1], (name, shape)
    # A mask of four bytes for layers of each kind, and what it is made of.
    mask_bytes = (rows if uneven else 1) * CHUNK * (4 * len(set(backbone.layer_types)) + 4)
    assert beside[LONG[1]] - beside[LONG[0]] <= (mask_bytes + 16) * (LONG[1] - LONG[0])


@torch.no_grad()
def test_each_row_is_judged_once_however_many_chunks_it_takes(monkeypatch) -> None:
    """The LM head is as large as several layers: it runs where a row ends and nowhere else."""
    backbone, judged = _long_backbone("qwen2", monkeypatch, 3 * CHUNK), []
    plain = backbone.logits
    backbone.logits = lambda hidden: judged.append(hidden.shape) or plain(hidden)
    backbone.prefill(prompts_of(700, 500, 690))
    # Rows 1 and 2 end in chunks of their own.
    assert judged == [(3, 32)] * 2
    backbone.chunk = CHUNK
    backbone.prefill(prompts_of(700))
    assert judged[2:] == [(1, 32)]


@torch.no_grad()
def test_a_prompt_that_is_one_pass_makes_no_mask(monkeypatch) -> None:
    backbone = _long_backbone("qwen2", monkeypatch, 4096)
    with Made() as made:
        backbone.prefill(prompts_of(700))
    assert not any(shape[-2:] == (700, 700) for _, shape in made.shapes)
    # The longest that there is: one pass of the feed-forward layer.
    assert made.largest() == 700 * backbone.config.intermediate_size


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("lengths", [(900, 900, 900), (900, 500, 700), (900,)])
@pytest.mark.parametrize("family_name", ["qwen2", "mistral", "gemma2", "gemma3_text"])
@torch.no_grad()
def test_a_step_makes_nothing_of_the_size_of_the_cache(family_name: str, lengths, watched: bool, monkeypatch) -> None:
    """No copy to grow it, none to repeat grouped heads, none to make it contiguous."""
    backbone = _long_backbone(family_name, monkeypatch, 2048)
    state = backbone.prefill(prompts_of(*lengths), room=10)
    backbone.inject(state, torch.randn(len(lengths), 2, 32), [True] + [False] * (len(lengths) - 1))
    backbone.observe(watched)
    one_head = len(lengths) * 900 * 8
    with Made() as made:
        for stepping in ([True] * len(lengths), [True] * (len(lengths) - 1) + [False]):
            backbone.step(state, torch.tensor([5] * len(lengths)), stepping)
    for name, shape in made.shapes:
        # A row of scores has one number a head, where the cache has 8.
        assert math.prod(shape) < one_head, (name, shape)


@torch.no_grad()
def test_memories_are_written_over_a_view_of_the_cache(monkeypatch) -> None:
    """Neighbours that take a memory together copy nothing of their history."""
    backbone = _long_backbone("qwen2", monkeypatch, 2048)
    state = backbone.prefill(prompts_of(900, 700, 800, 600), room=10)
    with Made() as made:
        part = state.rows([1, 2])
        since = list(part.lengths)
        backbone.inject(part, torch.randn(2, 4, 32))
        state.put([1, 2], part, since)
    assert made.largest() < 2 * 900 * 8 and state.lengths == [900, 704, 804, 600]
