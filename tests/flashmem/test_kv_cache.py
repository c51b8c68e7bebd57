"""The cache against plain Python lists: rows of their own length, forks that share, buffers that stay where they are.

A naive model keeps each row as the list of its positions. Random programs of everything that can be done to a cache are
run on both, and every cache that is alive is compared after every operation: what a fork must not see shows up at once.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from flashmem import TriggerConfig, generate, slots
from flashmem.kv_cache import RaggedCache
from flashmem.slots import Slots
from tests.flashmem.conftest import make_backbone, prompts_of, reference_model

LAYERS, HEADS = 2, 2
# What a pass writes behind the end of a row.
POISON = 7e6


@dataclass
class Twin:
    """A cache, and what it must hold: for each row the numbers of its positions and which of them are latents."""

    cache: RaggedCache
    rows: list[list[int]]
    latents: list[list[bool]]
    counter: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def empty(cls, rows: int, counter: list[int]) -> Twin:
        return cls(
            RaggedCache(LAYERS, rows, keep_inputs=True), [[] for _ in range(rows)], [[] for _ in range(rows)], counter
        )

    def numbers(self, counts: list[int], width: int) -> torch.Tensor:
        """`[B, Q]` new position numbers, poison behind each row's count."""
        new = torch.full((len(counts), width), POISON)
        for row, count in enumerate(counts):
            new[row, :count] = torch.arange(count) + self.counter[0] + 1.0
            self.counter[0] += count
        return new

    def extend(self, counts: list[int], width: int, latents: list[bool] | None = None) -> None:
        """One pass; `latents` says which rows' new positions are latents, None that nothing is said."""
        starts = torch.tensor(self.cache.lengths)
        slots = self.cache.place(width, lambda: starts)
        new = self.numbers(counts, width)
        self.cache.keep_inputs(new[..., None], slots)
        if latents is not None:
            ends = torch.tensor([n if mark else 0 for mark, n in zip(latents, counts, strict=True)])
            self.cache.mark(torch.arange(width) < ends[:, None], slots)
        seen = [layer.update(*keys_values(new, index)) for index, layer in enumerate(self.cache.layers)]
        self.cache.commit(counts)
        for row, count in enumerate(counts):
            self.rows[row] += new[row, :count].int().tolist()
            self.latents[row] += [bool(latents and latents[row])] * count
        assert all(keys.shape[2] == values.shape[2] == slots.end for keys, values in seen)
        self.compare(seen)

    def compare(self, held: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keys and values of all layers, `[B, G, T, 1]` each, against the lists."""
        numbers, inside = self.expected(held[0][0].shape[2])
        found = torch.stack([torch.stack(pair) for pair in held])
        wanted = torch.stack([torch.stack(keys_values(numbers, layer)) for layer in range(LAYERS)])
        here = inside[:, None, :, None].expand_as(found)
        assert torch.equal(found[here], wanted[here])

    def expected(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, width]` numbers of the positions, and which slots hold one."""
        numbers = torch.tensor([row + [0] * (width - len(row)) for row in self.rows], dtype=torch.float32)
        return numbers, numbers > 0

    def check(self) -> None:
        """Everything that the cache holds is what it must hold."""
        cache = self.cache
        assert cache.lengths == [len(row) for row in self.rows]
        assert [layer.get_seq_length() for layer in cache.layers] == [max(cache.lengths)] * LAYERS
        if not max(cache.lengths):
            return
        self.compare([(layer.keys, layer.values) for layer in cache.layers])
        numbers, inside = self.expected(max(cache.lengths))
        assert torch.equal(cache.inputs.view(max(cache.lengths))[..., 0][inside], numbers[inside])
        self.check_latents()

    def check_latents(self) -> None:
        marks = self.cache.marks
        found = [[]] * len(self.rows) if marks is None or marks.data is None else marks.data.tolist()
        for row, wanted in zip(found, self.latents, strict=True):
            # Nothing is marked behind the end, where the next pass may leave it as it is.
            assert row + [False] * (len(wanted) - len(row)) == wanted + [False] * (len(row) - len(wanted))

    def fork(self) -> Twin:
        return Twin(self.cache.fork(), [list(r) for r in self.rows], [list(r) for r in self.latents], self.counter)

    def crop(self, lengths: list[int]) -> None:
        self.cache.crop(lengths)
        self.rows = [row[:n] for row, n in zip(self.rows, lengths, strict=True)]
        self.latents = [row[:n] for row, n in zip(self.latents, lengths, strict=True)]

    def take(self, rows: list[int]) -> Twin:
        part = self.cache.rows(rows)
        return Twin(part, [list(self.rows[r]) for r in rows], [list(self.latents[r]) for r in rows], self.counter)

    def put(self, rows: list[int], part: Twin, since: list[int] | None) -> None:
        self.cache.put(rows, part.cache, since)
        for nth, row in enumerate(rows):
            self.rows[row], self.latents[row] = list(part.rows[nth]), list(part.latents[nth])

    def repeat(self, times: int) -> None:
        self.cache.repeat(times)
        self.rows = [list(row) for row in self.rows for _ in range(times)]
        self.latents = [list(row) for row in self.latents for _ in range(times)]


def keys_values(numbers: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, G, Q, 1]` keys and values that tell position, layer and head."""
    keys = torch.stack([numbers + 0.25 * layer + 0.5 * head for head in range(HEADS)], 1)[..., None]
    return keys, -keys


class Program:
    """A random sequence of operations on caches that share what they can."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.twins = [Twin.empty(self.draw.randint(1, 4), [0])]
        self.counter = self.twins[0].counter
        if self.draw.random() < 0.5:
            self.twins[0].cache.reserve(self.draw.randint(1, 40))

    def run(self, operations: int) -> None:
        kinds = ["extend"] * 6 + ["fork"] * 3 + ["part"] * 2
        kinds += ["crop", "refill", "repeat", "drop", "reading", "exchange"]
        for _ in range(operations):
            self.one(self.draw.choice(kinds))
            for twin in self.twins:
                twin.check()

    def one(self, kind: str) -> None:
        twin = self.draw.choice(self.twins)
        if kind == "extend":
            self.extend(twin)
        elif kind == "fork" and len(self.twins) < 5:
            self.twins.append(twin.fork())
        elif kind == "drop" and len(self.twins) > 1:
            self.twins.remove(twin)
        elif kind == "crop":
            twin.crop([self.draw.randint(0, n) for n in twin.cache.lengths])
        elif kind == "part":
            self.part(twin)
        elif kind == "refill":
            rows = self.some(len(twin.rows))
            fresh = Twin.empty(len(rows), self.counter)
            self.extend(fresh, least=1)
            twin.put(rows, fresh, None)
        elif kind == "repeat" and len(twin.rows) <= 3 and max(twin.cache.lengths):
            twin.repeat(2)
        elif kind == "reading" and max(twin.cache.lengths):
            self.read(twin)
        elif kind == "exchange":
            self.exchange(twin)

    def some(self, rows: int) -> list[int]:
        chosen = self.draw.sample(range(rows), self.draw.randint(1, rows))
        return chosen if self.draw.random() < 0.3 else sorted(chosen)

    def extend(self, twin: Twin, least: int = 0) -> None:
        width = self.draw.choice([1, 1, 2, 5, 11])
        even = self.draw.random() < 0.4
        counts = [width if even else self.draw.randint(least, width) for _ in twin.rows]
        said = self.draw.random() < 0.4
        twin.extend(counts, width, [self.draw.random() < 0.5 for _ in twin.rows] if said else None)

    def part(self, twin: Twin) -> None:
        """Some rows go on by themselves and come back."""
        rows = self.some(len(twin.rows))
        part, since = twin.take(rows), [twin.cache.lengths[row] for row in rows]
        for _ in range(self.draw.randint(0, 3)):
            self.extend(part)
            if self.draw.random() < 0.3:
                part.crop([self.draw.randint(low, n) for low, n in zip(since, part.cache.lengths, strict=True)])
        part.check()
        twin.put(rows, part, since if self.draw.random() < 0.7 else None)

    def exchange(self, twin: Twin) -> None:
        """Rows of another cache take the place of some."""
        other = self.draw.choice(self.twins)
        rows = self.some(min(len(twin.rows), len(other.rows)))
        if other is not twin and max(other.cache.lengths):
            twin.put(rows, other.take(rows), None)

    def read(self, twin: Twin) -> None:
        """New positions are shown behind the old ones and nothing of them stays."""
        cache, width = twin.cache.reading(), self.draw.randint(1, 4)
        starts = torch.tensor(cache.lengths)
        slots = cache.place(width, lambda: starts)
        new = twin.numbers([width] * len(twin.rows), width)
        rows = [row + extra.int().tolist() for row, extra in zip(twin.rows, new, strict=True)]
        shown = Twin(cache, rows, twin.latents)
        seen = [layer.update(*keys_values(new, index)) for index, layer in enumerate(cache.layers)]
        assert all(keys.shape[2] == slots.end for keys, _ in seen)
        shown.compare(seen)
        cache.commit([width] * len(rows))
        assert cache.lengths == twin.cache.lengths


@pytest.mark.parametrize("granule", [1, 4, 64])
@pytest.mark.parametrize("block", range(4))
def test_random_programs_hold_what_lists_hold(granule: int, block: int, monkeypatch) -> None:
    monkeypatch.setattr(slots, "GRANULE", granule)
    for seed in range(25):
        program = Program(10_000 * block + 100 * granule + seed)
        try:
            program.run(30)
        except Exception as error:
            raise AssertionError(f"Program({10_000 * block + 100 * granule + seed})") from error


def _filled(length: int, rows: int = 1, reserve: int = 0) -> Twin:
    twin = Twin.empty(rows, [0])
    twin.cache.reserve(reserve)
    twin.extend([length] * rows, length)
    return twin


def _pointers(cache: RaggedCache) -> list[int]:
    return [buffer.data.data_ptr() for buffer in cache._buffers()]


@pytest.mark.parametrize("lengths", [(13, 13, 13), (19, 6, 11)])
def test_contents_are_those_of_a_dynamic_cache(family: str, lengths: tuple[int, ...]) -> None:
    """Prompt, latents for some rows, then a token: the keys and values of each row alone through transformers."""
    backbone, model = make_backbone(family), reference_model(family, "eager" if family == "gemma2" else "sdpa")
    prompts, tokens = prompts_of(*lengths), torch.tensor([9, 10, 11])
    latents, takes = torch.randn(3, 4, backbone.hidden_size) * 0.3, [True, False, True]
    with torch.no_grad():
        state = backbone.prefill(prompts)
        backbone.inject(state, latents, takes)
        backbone.step(state, tokens)
        for row, prompt in enumerate(prompts):
            parts = [backbone.embed(torch.tensor([prompt])), backbone.embed(tokens[row][None, None])]
            if takes[row]:
                parts.insert(1, latents[row : row + 1])
            alone = DynamicCache()
            model.model(inputs_embeds=torch.cat(parts, 1), past_key_values=alone)
            length = state.lengths[row]
            assert length == alone.get_seq_length() == len(prompt) + 1 + 4 * takes[row]
            for ours, theirs in zip(state.cache.layers, alone.layers, strict=True):
                torch.testing.assert_close(ours.keys[row, :, :length], theirs.keys[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(ours.values[row, :, :length], theirs.values[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(60, 60), (60, 31)])
def test_growing_beyond_what_was_reserved_keeps_what_is_held(lengths: tuple[int, ...]) -> None:
    twin = Twin.empty(2, [0])
    twin.cache.reserve(64)
    twin.extend(list(lengths), 60, [True, False])
    assert twin.cache.capacity == 64
    seen = {64}
    for width in (4, 1, 30, 1, 80, 1):
        twin.extend([width, 1], width)
        twin.check()
        seen.add(twin.cache.capacity)
    # Half as much again each time, in whole granules, and not at every pass.
    assert sorted(seen) == [64, 128, 192]


def test_the_first_fork_to_go_on_copies_nothing_and_the_second_does() -> None:
    twin = _filled(20)
    held = _pointers(twin.cache)
    first, second = twin.fork(), twin.fork()
    first.extend([3], 3)
    assert _pointers(first.cache) == held
    second.extend([2], 2)
    assert not set(_pointers(second.cache)) & set(held)
    for other in (twin, first, second):
        other.check()
    first.extend([1], 1)
    assert _pointers(first.cache) == held, "who was there first stays"
    twin.extend([1], 1)
    assert not set(_pointers(twin.cache)) & set(held), "the parent is a fork like the others"
    for other in (twin, first, second):
        other.check()


def test_a_fork_that_is_dropped_gives_back_the_right_to_write_in_place() -> None:
    twin = _filled(20)
    held = _pointers(twin.cache)
    fork = twin.fork()
    fork.extend([5], 5, [True])
    del fork
    gc.collect()
    twin.extend([2], 2)
    assert _pointers(twin.cache) == held
    twin.check()


def test_a_fork_of_a_fork_is_spared_too() -> None:
    twin = _filled(10)
    child = twin.fork()
    child.extend([4], 4)
    grandchild = child.fork()
    grandchild.extend([4], 4)
    assert _pointers(grandchild.cache) == _pointers(twin.cache)
    del child
    gc.collect()
    twin.extend([3], 3)
    for other in (twin, grandchild):
        other.check()


def test_marks_reach_as_far_as_keys_whatever_comes_behind_them() -> None:
    """Passes without latents write no marks; every operation must still find them wide enough."""
    twin = Twin.empty(3, [0])
    twin.extend([8, 5, 8], 8, [True, True, False])
    twin.extend([1, 190, 3], 190)
    part = twin.take([0, 2])
    part.check()
    twin.put([0, 2], part, None)
    fork = twin.fork()
    fork.extend([1, 1, 1], 1)
    twin.extend([2, 2, 2], 2)
    twin.repeat(2)
    for other in (twin, fork):
        other.check()


def test_a_row_that_is_replaced_leaves_no_mark_behind() -> None:
    twin = Twin.empty(2, [0])
    twin.extend([30, 10], 30, [True, True])
    fresh = Twin.empty(1, twin.counter)
    fresh.extend([6], 6)
    twin.put([0], fresh, None)
    twin.check()
    twin.extend([20, 1], 20)
    twin.check()
    assert twin.cache.marks.data.sum() == 10


def _prefilled(monkeypatch) -> list:
    """States that `generate` makes from now on."""
    from flashmem import Backbone

    made, plain = [], Backbone.prefill

    def prefill(self, prompts, **more):
        made.append(plain(self, prompts, **more))
        made.append(_pointers(made[-1].cache))
        return made[-2]

    monkeypatch.setattr(Backbone, "prefill", prefill)
    return made


@pytest.mark.parametrize("lengths", [(40, 40), (40, 25, 33)])
def test_a_whole_decode_stays_in_the_buffers_of_its_prefill(lengths: tuple[int, ...], monkeypatch) -> None:
    from flashmem import MemoryConfig, new_memory

    backbone, made = make_backbone(), _prefilled(monkeypatch)
    torch.manual_seed(0)
    memory = new_memory(MemoryConfig(length=4), backbone)
    caps = (5, 2, 4)[: len(lengths)]
    trigger = [TriggerConfig(kind="every", interval=7, cooldown=0, max_injections=cap) for cap in caps]
    config = GenerationConfig(max_new_tokens=60, do_sample=False, eos_token_id=-1)
    runs = generate(backbone, prompts_of(*lengths), memory=memory, trigger=trigger, generation_config=config)
    state, held = made
    assert [run.latent_tokens for run in runs] == [4 * cap for cap in caps]
    assert [n + 59 + run.latent_tokens for n, run in zip(lengths, runs, strict=True)] == state.lengths
    # The marks came with the first latent.
    assert _pointers(state.cache)[: len(held)] == held
    assert state.cache.capacity == state.cache.marks.capacity == 128


def test_a_longer_prompt_that_comes_later_makes_room_at_once(monkeypatch) -> None:
    """Not step by step: what it reserves holds for the batch that it joins."""
    from flashmem.slots import SlotBuffer

    backbone, made, plain = make_backbone(), [], SlotBuffer.resized

    def resized(self, like, capacity, held):
        made.append((like.shape[0], capacity))
        plain(self, like, capacity, held)

    monkeypatch.setattr(SlotBuffer, "resized", resized)
    config = GenerationConfig(max_new_tokens=90, do_sample=False, eos_token_id=-1)
    generate(backbone, prompts_of(20, 15, 200, 300), generation_config=config, batch_size=2)
    # Keys and values of three layers: the first two prompts, the next two, and the batch that these join.
    assert made == [(2, 128)] * 6 + [(2, 448)] * 6 + [(2, 448)] * 6


def test_what_lies_behind_a_short_row_is_never_seen(family: str) -> None:
    """Large numbers in every slot that no row holds: nothing changes."""
    prompts, seen = prompts_of(21, 8, 15), {}
    latents = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    for poison in (0.0, 1e4):
        backbone = make_backbone(family)
        backbone.observe(True)
        with torch.no_grad():
            state, outputs = backbone.prefill(prompts, room=20), []
            _poison(state, poison)
            for move in range(4):
                if move == 1:
                    backbone.inject(state, latents, [False, True, True])
                elif move == 2:
                    backbone.append(state, [[5, 6, 7], [], [8]])
                else:
                    backbone.step(state, torch.tensor([9, 10, 11]), [True, True, move == 3])
                _poison(state, poison)
                outputs += [state.logits, state.hidden, state.entropy[:, None]]
        seen[poison] = torch.cat(outputs, 1)
    assert torch.equal(seen[0.0], seen[1e4])


def _poison(state, value: float) -> None:
    behind = torch.arange(state.cache.capacity) >= torch.tensor(state.lengths)[:, None]
    for layer in state.cache.layers:
        for buffer in layer.buffers:
            buffer.data.masked_fill_(behind[:, None, :, None], value)


def test_slots_of_even_rows_need_no_index() -> None:
    twin = _filled(7, rows=3)
    assert twin.cache.even and twin.cache.place(2, lambda: pytest.fail("asked for lengths")) == Slots(7, 9)
    assert twin.cache.layers[0].get_mask_sizes(2) == (9, 0)
