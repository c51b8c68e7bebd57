"""Rows of a batch under way: taken out, put back, replaced, forgotten, forked and saved, against plain lists.

Random programs run on a state and on a naive model that keeps for each row what it holds and what was counted. What a
memory source keeps aside (its own state, of rows that may lag behind) goes through all of it too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from transformers import GenerationConfig

from flashmem import MemoryConfig, TriggerConfig, generate, new_memory, slots
from flashmem.errors import ConfigError
from flashmem.eviction import EvictionConfig, prefill_and_evict
from flashmem.kv_cache import RaggedCache
from flashmem.session import Session
from flashmem.state import DecodeState, behind, new_state
from tests.flashmem.conftest import make_backbone, prompts_of
from tests.flashmem.test_kv_cache import LAYERS, Twin

OWN = "own"


@dataclass
class Row:
    """What one row must be."""

    numbers: list[int] = field(default_factory=list)
    latents: list[bool] = field(default_factory=list)
    tag: int = 0
    encoded: int = 0
    woven: int = 0
    reused: int = 0
    own: Row | None = None

    def copy(self, **changes) -> Row:
        own = self.own.copy() if self.own is not None else None
        return replace(self, numbers=list(self.numbers), latents=list(self.latents), **{"own": own, **changes})

    def forked(self) -> Row:
        own = self.own.forked() if self.own is not None else None
        return self.copy(encoded=0, woven=0, reused=len(self.numbers), own=own)


@dataclass
class Pair:
    """A state and its rows."""

    state: DecodeState
    rows: list[Row]
    counter: list[int]

    @classmethod
    def empty(cls, rows: int, counter: list[int]) -> Pair:
        cache = RaggedCache(LAYERS, rows, keep_inputs=True)
        state = new_state(cache, partial(torch.zeros), vocabulary=3, width=2, like=torch.float32)
        return cls(state, [Row() for _ in range(rows)], counter)

    def cache(self) -> Twin:
        rows = self.rows
        return Twin(self.state.cache, [r.numbers for r in rows], [r.latents for r in rows], self.counter)

    def extend(self, counts: list[int], width: int, latents: list[bool] | None) -> None:
        """What a backbone does to a state in one pass."""
        state = self.state
        assert state.ends().tolist() == state.lengths
        self.cache().extend(counts, width, latents)
        state.next_position = state.next_position + torch.tensor(counts)
        state.encoded = [n + count for n, count in zip(state.encoded, counts, strict=True)]
        tags = torch.tensor(
            [float(row.numbers[-1] if n else row.tag) for row, n in zip(self.rows, counts, strict=True)]
        )
        state.logits, state.hidden, state.entropy = tags[:, None].expand(-1, 3) + 1, tags[:, None].expand(-1, 2), tags
        for row, count in zip(self.rows, counts, strict=True):
            row.encoded, row.tag = row.encoded + count, row.numbers[-1] if count else row.tag

    def check(self) -> None:
        state, rows = self.state, self.rows
        self.cache().check()
        assert state.batch_size == len(rows)
        lengths = [len(row.numbers) for row in rows]
        assert state.next_position.tolist() == state.ends().tolist() == lengths
        assert state.evicted == [0] * len(rows)
        for row, row_lengths, logits, hidden, entropy in zip(
            rows, lengths, state.logits, state.hidden, state.entropy.tolist(), strict=True
        ):
            if row_lengths:
                # An empty row has no newest position.
                assert [*logits.tolist(), *hidden.tolist(), entropy] == [row.tag + 1] * 3 + [row.tag] * 3
        for name in ("encoded", "woven", "reused"):
            assert getattr(state, name) == [getattr(row, name) for row in rows], name
        assert state.latents.tolist() == [row.latents + [False] * (max(lengths) - len(row.latents)) for row in rows]
        self.check_own()

    def check_own(self) -> None:
        own, rows = self.state.kept.get(OWN), [row.own for row in self.rows]
        if own is None:
            assert not any(row is not None and row.numbers for row in rows)
            return
        Pair(own, [row or Row() for row in rows], self.counter).check()

    def weave(self, draw: random.Random) -> None:
        """A memory source reads on in a state of its own and forgets some of it again."""
        own = self.state.kept.get(OWN)
        pair = Pair.empty(len(self.rows), self.counter) if own is None else Pair(own, [], self.counter)
        pair.rows = [row.own or Row() for row in self.rows]
        counts = [draw.randint(1, 5) for _ in self.rows]
        before = list(pair.state.lengths)
        pair.extend(counts, max(counts), None)
        pair.crop([draw.randint(low, n) for low, n in zip(before, pair.state.lengths, strict=True)])
        self.state.kept[OWN] = pair.state
        self.state.woven = [n + 7 for n in self.state.woven]
        for row, own_row in zip(self.rows, pair.rows, strict=True):
            row.own, row.woven = own_row, row.woven + 7

    def crop(self, lengths: list[int]) -> None:
        self.state.crop(lengths)
        for row, length in zip(self.rows, lengths, strict=True):
            del row.numbers[length:], row.latents[length:]

    def fork(self) -> Pair:
        return Pair(self.state.fork(), [row.forked() for row in self.rows], self.counter)

    def take(self, rows: list[int]) -> Pair:
        # All rows are the state itself.
        kept = [self.rows[row] if rows == list(range(len(self.rows))) else self.rows[row].copy() for row in rows]
        return Pair(self.state.rows(rows), kept, self.counter)

    def put(self, rows: list[int], other: Pair, since: list[int] | None = None) -> None:
        self.state.put(rows, other.state, since)
        for nth, row in enumerate(rows):
            self.rows[row] = other.rows[nth]

    def release(self, row: int) -> None:
        self.state.release(row)
        self.rows[row] = Row()


class Program:
    """A random sequence of what the decode loop, sessions and methods do to states."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.counter = [0]
        self.pairs = [Pair.empty(self.draw.randint(1, 4), self.counter)]
        self.extend(self.pairs[0], least=1)

    def run(self, operations: int) -> None:
        kinds = ["extend"] * 5 + ["part"] * 4 + ["fork"] * 2 + ["refill"] * 2 + ["weave"] * 2
        kinds += ["crop", "release", "only", "repeat", "drop", "adopt"]
        for _ in range(operations):
            self.one(self.draw.choice(kinds))
            for pair in self.pairs:
                pair.check()

    def one(self, kind: str) -> None:
        place = self.draw.randrange(len(self.pairs))
        pair = self.pairs[place]
        match kind:
            case "extend":
                self.extend(pair)
            case "weave":
                pair.weave(self.draw)
            case "part":
                self.part(pair)
            case "fork" if len(self.pairs) < 4:
                self.pairs.append(pair.fork())
            case "drop" if len(self.pairs) > 1:
                self.pairs.remove(pair)
            case "crop":
                pair.crop([self.draw.randint(0, n) for n in pair.state.lengths])
            case "release":
                pair.release(self.draw.randrange(len(pair.rows)))
            case "only":
                rows = self.some(len(pair.rows))
                self.pairs[place] = Pair(pair.state.only(rows), [pair.rows[row].copy() for row in rows], self.counter)
            case "repeat" if len(pair.rows) < 3:
                self.repeat(pair)
            case "refill":
                rows = self.some(len(pair.rows))
                pair.put(rows, self.fresh(len(rows)))
            case "adopt":
                self.adopt(pair)

    def some(self, rows: int) -> list[int]:
        return sorted(self.draw.sample(range(rows), self.draw.randint(1, rows)))

    def fresh(self, rows: int) -> Pair:
        fresh = Pair.empty(rows, self.counter)
        self.extend(fresh, least=1)
        if self.draw.random() < 0.3:
            fresh.weave(self.draw)
        return fresh

    def extend(self, pair: Pair, least: int = 0) -> None:
        width = self.draw.choice([1, 1, 3, 9])
        counts = [self.draw.randint(least, width) for _ in pair.rows]
        said = self.draw.random() < 0.4
        pair.extend(counts, width, [self.draw.random() < 0.5 for _ in pair.rows] if said else None)

    def part(self, pair: Pair) -> None:
        rows = self.some(len(pair.rows))
        part, since = pair.take(rows), [pair.state.lengths[row] for row in rows]
        if self.draw.random() < 0.5:
            part.weave(self.draw)
        for _ in range(self.draw.randint(0, 2)):
            self.extend(part)
        part.check()
        pair.put(rows, part, since if self.draw.random() < 0.7 else None)

    def adopt(self, pair: Pair) -> None:
        """The rows are encoded again from the beginning."""
        fresh = self.fresh(len(pair.rows))
        fresh.state.encoded = [old + new for old, new in zip(pair.state.encoded, fresh.state.encoded, strict=True)]
        pair.state.adopt(fresh.state)
        for row, new in zip(pair.rows, fresh.rows, strict=True):
            row.numbers, row.latents, row.tag = new.numbers, new.latents, new.tag
            row.encoded += new.encoded

    def repeat(self, pair: Pair) -> None:
        if not pair.state.length:
            return
        pair.state.repeat(2)
        own = pair.state.kept.get(OWN)
        repeated = []
        for row in pair.rows:
            # What was encoded once counts once.
            other = row.copy(encoded=0, woven=0, reused=0)
            if other.own is not None:
                other.own = other.own.copy(encoded=0, woven=0, reused=0)
            repeated += [row, other]
        assert own is None or own.batch_size == len(repeated)
        pair.rows = repeated


@pytest.mark.parametrize("granule", [1, 64])
@pytest.mark.parametrize("block", range(4))
def test_random_programs_hold_what_lists_hold(granule: int, block: int, monkeypatch) -> None:
    monkeypatch.setattr(slots, "GRANULE", granule)
    for seed in range(20):
        number = 10_000 * block + 100 * granule + seed
        try:
            Program(number).run(25)
        except Exception as error:
            raise AssertionError(f"Program({number})") from error


NEW = 6
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)


def _session(history: list[int]) -> Session:
    backbone = make_backbone()
    torch.manual_seed(1)
    memory = new_memory(MemoryConfig(length=3), backbone)
    session = Session(backbone, memory, TriggerConfig(kind="every", interval=2, cooldown=0, max_injections=None))
    session.extend(history)
    return session


def test_latents_of_a_dropped_fork_are_none_of_the_history() -> None:
    """The fork wrote them behind the history, in place; then the history goes on over the same slots."""
    history, question, rest = prompts_of(20, 2, 12)
    session, untouched = _session(history), _session(history)
    for one in (session, untouched):
        one.generate(GREEDY)
    held = session.latents
    assert session.ask(question, GREEDY).latent_tokens == 9
    for one in (session, untouched):
        one.extend(rest)
    assert session.latents == untouched.latents == held == 9
    assert session.entropy == pytest.approx(untouched.entropy, abs=1e-6)
    torch.testing.assert_close(session.logits, untouched.logits)


def test_a_history_that_outgrew_its_latents_can_still_be_forked() -> None:
    history, question, rest = prompts_of(10, 5, 150)
    session = _session(history)
    session.generate(GREEDY)
    session.extend(rest)
    forks = [session.fork(), session.fork()]
    for fork in forks:
        fork.extend(question)
    torch.testing.assert_close(forks[0].logits, forks[1].logits)
    assert [fork.latents for fork in forks] == [9, 9]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evicted_rows_leave_and_are_replaced_as_they_would_alone(batch_size: int, backbone) -> None:
    """A row whose positions are ahead of its slots is emptied and filled again."""
    config = GenerationConfig(max_new_tokens=25, do_sample=False, eos_token_id=list(range(4, 14)))
    prompts, eviction = [prompts_of(248, seed=s)[0] for s in range(6)], EvictionConfig("snapkv", 20, window=4)

    def prefill(some):
        return prefill_and_evict(backbone, some, eviction)

    def run(some, size):
        return generate(backbone, some, generation_config=config, prefill=prefill, batch_size=size)

    alone, together = [run([prompt], 1)[0] for prompt in prompts], run(prompts, batch_size)
    assert len({len(one.token_ids) for one in alone}) > 2
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.positions_encoded, one.positions_evicted) == (
            other.token_ids,
            other.positions_encoded,
            other.positions_evicted,
        )
        assert other.positions_evicted == 228


def test_what_was_evicted_takes_no_room(backbone) -> None:
    (prompt,) = prompts_of(300)
    state = prefill_and_evict(backbone, [prompt], EvictionConfig("tova", 20))
    assert state.cache.capacity < 100 and state.lengths == [20] and state.evicted == [280]
    held = [buffer.data.data_ptr() for buffer in state.cache.layers[0].buffers]
    for token in (5, 6, 7):
        backbone.step(state, torch.tensor([token]))
    assert [buffer.data.data_ptr() for buffer in state.cache.layers[0].buffers] == held
    assert (state.lengths, state.next_position.tolist()) == ([23], [303])


def test_a_state_of_uneven_rows_is_the_same_after_it_was_taken_apart(family: str) -> None:
    backbone = make_backbone(family)
    backbone.observe(True)
    with torch.no_grad():
        state = backbone.prefill(prompts_of(17, 6, 30), keep_inputs=True)
        backbone.inject(state, torch.randn(3, 3, 32) * 0.3, [True, False, True])
        tensors = {name: tensor.clone() for name, tensor in state.exported().items()}
        again = backbone.import_state(tensors)
        assert (again.lengths, again.encoded, again.reused) == ([20, 6, 33], [0, 0, 0], [20, 6, 33])
        for one in (state, again):
            backbone.step(one, torch.tensor([7, 8, 9]), [True, True, False])
            backbone.append(one, [[5], [6, 7, 8], []])
    for name in ("logits", "hidden", "entropy", "next_position"):
        torch.testing.assert_close(getattr(again, name), getattr(state, name))
    assert torch.equal(again.latents, state.latents) and again.lengths == state.lengths == [22, 10, 33]
    inside = torch.arange(33) < torch.tensor(state.lengths)[:, None]
    assert torch.equal(again.inputs[inside], state.inputs[inside])


def test_an_evicted_state_is_not_taken_apart(backbone) -> None:
    state = prefill_and_evict(backbone, prompts_of(30), EvictionConfig("tova", 10))
    with pytest.raises(ConfigError, match="save it before eviction"):
        state.exported()


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("lengths", [(12, 12), (12, 3, 8)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_visible_from_behind_each_row(window: int | None, lengths: tuple[int, ...], ahead: int) -> None:
    pair = Pair.empty(len(lengths), [0])
    pair.extend(list(lengths), max(lengths), None)
    found = pair.state.visible(ahead, window)
    wanted = [
        [slot < n and (window is None or n + ahead - slot < window) for slot in range(max(lengths))] for n in lengths
    ]
    if found is None:
        assert all(map(all, wanted))
    else:
        assert found.shape == (len(lengths), 1, 1, max(lengths)) and found[:, 0, 0].tolist() == wanted
    assert (found is None) == all(map(all, wanted))


def test_new_positions_stand_right_behind_each_row() -> None:
    held = torch.arange(1.0, 9).view(2, 4).requires_grad_()
    new = torch.tensor([[10.0, 11], [20, 21]], requires_grad=True)
    whole = behind(held, [4, 1], new, 7)
    assert whole.tolist() == [[1, 2, 3, 4, 10, 11, 0], [5, 20, 21, 8, 0, 0, 0]]
    assert behind(held, [2, 1], new, 4)[:, :4].tolist() == [[1, 2, 10, 11], [5, 20, 21, 8]]
    whole[:, :3].sum().backward()
    assert new.grad.tolist() == [[0, 0], [1, 1]] and held.grad.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_all_rows_are_the_state_itself_and_neighbours_are_views() -> None:
    pair = Pair.empty(3, [0])
    pair.extend([5, 3, 4], 5, None)
    state = pair.state
    assert state.rows([0, 1, 2]) is state
    held = state.cache.layers[0].buffers[0].data
    assert state.rows([1, 2]).cache.layers[0].buffers[0].data.data_ptr() == held[1].data_ptr()
    assert state.rows([0, 2]).cache.layers[0].buffers[0].data.data_ptr() != held.data_ptr()
    # A batch that goes on smaller holds nothing of the others.
    assert state.only([1, 2]).cache.layers[0].buffers[0].data.data_ptr() != held[1].data_ptr()


def test_reading_leaves_nothing_behind(family: str) -> None:
    backbone = make_backbone(family)
    with torch.no_grad():
        state = backbone.prefill(prompts_of(15, 6))
        before = {name: tensor.clone() for name, tensor in state.exported().items()}
        embeds = backbone.embed(torch.tensor(prompts_of(4, 4, seed=1)))
        shown = backbone.extend(state.reading(), embeds)
        after = state.exported()
        inside = torch.arange(15) < torch.tensor([15, 6])[:, None]
        for name, tensor in before.items():
            same = torch.equal(tensor, after[name])
            assert same or torch.equal(tensor.transpose(1, 2)[inside], after[name].transpose(1, 2)[inside]), name
        assert state.lengths == [15, 6] and state.encoded == [15, 6]
        torch.testing.assert_close(shown, backbone.extend(state, embeds), rtol=1e-5, atol=1e-5)
