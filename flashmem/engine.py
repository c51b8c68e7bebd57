"""How the passes of a decode are run: one kernel after the other, compiled, or replayed as a CUDA graph.

A decode step of a small model is bound by the launches of its kernels, not by memory: some fifteen for each layer, each
of a few microseconds. `Engine` runs them as they come. `StaticEngine` runs the same passes in a form that never asks
the host for anything, so that they can be recorded once and replayed: tensors that stay where they are, lengths on the
device, and attention over a *bucket*, the next of a few lengths, with what lies behind a row's end masked. There are
three such passes: one token a row, the K steps of a consolidator, and the K latents of an injection. The next token and
both entropies are made in the same pass and leave in one copy.

A recording belongs to the addresses of the cache that it was made with. So the buffers of a cache that nobody uses any
more are handed to the next one (`lend`), and a prompt that fits reads into them directly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashmem import attention
from flashmem.errors import ConfigError
from flashmem.kv_cache import RaggedCache
from flashmem.monitor import AttentionTap
from flashmem.sampling import look
from flashmem.slots import SlotBuffer, Slots
from flashmem.state import DecodeState

if TYPE_CHECKING:
    from flashmem.backbone import Backbone
    from flashmem.memory import MemoryContext, MemorySource

EXECUTIONS = ("eager", "compile", "graph")
_LEAST_BUCKET = 128
# Buckets for each doubling of the length: the mean of what is read for nothing is half of one in so many.
_BUCKETS = 16
_WARM_UPS = 3
# What a state says of its newest positions.
_HELD = ("next_position", "logits", "hidden", "entropy")


def bucket_of(length: int) -> int:
    """The next length for which passes are recorded."""
    step = max(_LEAST_BUCKET, (1 << (max(length, 1).bit_length() - 1)) // _BUCKETS)
    return -(-length // step) * step


class Engine:
    """Runs every pass as it comes; see the module.

    Attributes:
        static: passes are recorded for a fixed number of rows, which must then not change.
        paused: what stops the clock of a call while a pass is recorded.
    """

    static = False

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext

    def lend(self, cache: RaggedCache) -> None:
        """Give an empty cache buffers that are there already, where there are any."""

    def step(self, state: DecodeState, tokens: Sequence[int], takes: Sequence[bool]) -> None:
        """Feed one token to each row that takes one."""
        ids = torch.tensor(tokens, device=self.backbone.device)
        self.backbone.step(state, ids, takes)

    def write(self, memory: MemorySource, context: MemoryContext, whole: DecodeState, rows: Sequence[int]) -> Tensor:
        """Memories `[n, K, d]` of the rows that the context shows, which are these rows of a whole state."""
        return memory(context)

    def inject(self, state: DecodeState, part: DecodeState, latents: Tensor, rows: Sequence[int]) -> None:
        """Feed memories `[n, K, d]` to some rows of a state; `part` is their `state.rows`."""
        since = list(part.lengths)
        self.backbone.inject(part, latents)
        state.put(rows, part, since)

    def seen(self, state: DecodeState) -> Tensor | None:
        """What `sampling.look` says of a state, `[3, B]`, where the last pass has made it already."""
        return None


@dataclass
class _Seats:
    """The tensors that the recorded passes of B rows read and write; they stay where they are."""

    tokens: Tensor
    takes: Tensor
    next_position: Tensor
    logits: Tensor
    hidden: Tensor
    entropy: Tensor
    gone: Tensor
    look: Tensor
    latents: dict[int, Tensor] = field(default_factory=dict)
    owner: Callable[[], DecodeState | None] = lambda: None

    def bind(self, state: DecodeState) -> None:
        """Hold what the state holds; from here on the state's tensors are these."""
        before = self.owner()
        if before is not None and before is not state:
            for name in _HELD:
                if getattr(before, name) is getattr(self, name):
                    setattr(before, name, getattr(self, name).clone())
        self.owner = weakref.ref(state)
        for name in _HELD:
            mine, theirs = getattr(self, name), getattr(state, name)
            if mine is not theirs:
                mine.copy_(theirs)
                setattr(state, name, mine)
        if any(state.evicted):
            self.gone.copy_(torch.tensor(state.evicted, device=self.gone.device))
        else:
            self.gone.zero_()


Recorder = Callable[[Callable[[], None]], Callable[[], None]]
Pass = Callable[[DecodeState, Slots], None]


class StaticEngine(Engine):
    """Records passes of fixed shape and replays them.

    Args:
        backbone: the model.
        record: turns a pass into something that does the same when it is called; it may call the pass to warm up.
    """

    static = True

    def __init__(self, backbone: Backbone, record: Recorder) -> None:
        super().__init__(backbone)
        self._record = record
        self._seats: dict[int, _Seats] = {}
        self._passes: dict[tuple[Any, ...], Callable[[], None]] = {}
        # The buffers that the passes are recorded over, and who holds them.
        self._buffers: RaggedCache | None = None
        self._user: Callable[[], RaggedCache | None] = lambda: None

    def lend(self, cache: RaggedCache) -> None:
        """See `Engine.lend`."""
        slots, mine = bucket_of(cache.book.reserved), self._buffers
        cache.reserve(slots)
        if mine is None or self._user() is not None:
            return
        if len(mine.lengths) == len(cache.lengths) and mine.capacity >= slots and mine.alike(cache):
            cache.borrow(mine)
            self._user = weakref.ref(cache)

    def step(self, state: DecodeState, tokens: Sequence[int], takes: Sequence[bool]) -> None:
        """See `Engine.step`."""
        seats = self._bind(state, 1, takes)
        seats.tokens.copy_(torch.tensor(tokens), non_blocking=True)
        self._play(state, seats, 1, ("step",), lambda stage, slots: self._token_pass(stage, seats, slots))
        self._count(state, [int(takes_it) for takes_it in takes])

    def write(self, memory: MemorySource, context: MemoryContext, whole: DecodeState, rows: Sequence[int]) -> Tensor:
        """See `Engine.write`. The shared-KV consolidator is replayed, for all rows; others are run as they come."""
        from flashmem.consolidator import SharedKVMemory

        if type(memory) is not SharedKVMemory or memory.config.latent_attention != "none":
            return memory(context)
        length = memory.config.length
        seats = self._bind(whole, length, [False] * whole.batch_size)
        made = self._latents(seats, length)

        def consolidate(stage: DecodeState, slots: Slots) -> None:
            made.copy_(memory.consolidator(seats.hidden, self.backbone, stage, stage.keys_values))

        self._play(whole, seats, 0, ("write", id(memory), length), consolidate)
        return made[list(rows)]

    def inject(self, state: DecodeState, part: DecodeState, latents: Tensor, rows: Sequence[int]) -> None:
        """See `Engine.inject`."""
        length, count = latents.shape[1], state.batch_size
        state.note(rows, part)
        takes = [row in rows for row in range(count)]
        seats = self._bind(state, length, takes)
        held = self._latents(seats, length)
        if len(rows) == count:
            held.copy_(latents)
        else:
            held[list(rows)] = latents.to(held.dtype)
        name = ("inject", length)
        self._play(state, seats, length, name, lambda stage, slots: self._latent_pass(stage, seats, held, slots))
        self._count(state, [length * takes_it for takes_it in takes])

    def _latents(self, seats: _Seats, length: int) -> Tensor:
        """Where memories of K latents lie between the pass that writes them and the one that reads them."""
        if length not in seats.latents:
            seats.latents[length] = self._zeros(len(seats.tokens), length, self.backbone.hidden_size)
        return seats.latents[length]

    def seen(self, state: DecodeState) -> Tensor | None:
        """See `Engine.seen`."""
        seats = self._seats.get(state.batch_size)
        return seats.look if seats is not None and state.logits is seats.logits else None

    def _bind(self, state: DecodeState, width: int, takes: Sequence[bool]) -> _Seats:
        """Have the tensors of the recorded passes say what the state says, and room for the pass."""
        rows = state.batch_size
        if rows not in self._seats:
            self._seats[rows] = self._new_seats(rows, state)
        seats = self._seats[rows]
        seats.bind(state)
        seats.takes.copy_(torch.tensor(takes), non_blocking=True)
        if state.cache.marks is None:
            state.cache.marks = SlotBuffer(1)
        bucket = bucket_of(state.length + width)
        self._move_in(state.cache, bucket)
        state.cache.make_room(bucket)
        self._adopt(state.cache)
        return seats

    def _move_in(self, cache: RaggedCache, slots: int) -> None:
        """Copy a cache into the buffers of the passes, where they are free: cheaper than to record anew.

        A fork of a kept prefix comes with buffers of its own each time.
        """
        mine = self._buffers
        if mine is None or self._user() is not None or mine.shares(cache):
            return
        if len(mine.lengths) == len(cache.lengths) and mine.capacity >= slots and mine.alike(cache):
            cache.move_to(mine)
            self._user = weakref.ref(cache)

    def _adopt(self, cache: RaggedCache) -> None:
        """Remember whose buffers the passes are recorded over; others than before make the recordings worthless."""
        if self._buffers is None or not self._buffers.shares(cache):
            self._passes.clear()
            self._buffers = cache.alias()
        else:
            self._buffers.hand_marks(cache, self._user())
        self._user = weakref.ref(cache)

    def _play(self, state: DecodeState, seats: _Seats, width: int, name: tuple[Any, ...], run: Pass) -> None:
        """Replay a pass, or record it first."""
        bucket, tap = bucket_of(state.length + width), self.backbone.tap
        # What the monitor counts is part of what is recorded.
        key = (*name, bucket, None if tap is None else (tap.rows, self.backbone.monitor))
        with _recorded(tap):
            if key not in self._passes:
                # What is recorded once is in nobody's time.
                with self.paused():
                    self._passes[key] = self._new_pass(state, seats, bucket, width, run)
            self._passes[key]()

    def _new_pass(self, state: DecodeState, seats: _Seats, bucket: int, width: int, run: Pass) -> Callable[[], None]:
        # Not the state itself: its recordings outlive it.
        assert self._buffers is not None
        stage = replace(state, cache=self._buffers, kept={})
        kernel = self._kernel(state, bucket)

        def whole_pass() -> None:
            ends = torch.sub(seats.next_position, seats.gone)
            index = ends[:, None] + torch.arange(max(width, 1), device=ends.device)
            slots = Slots(None, bucket, index)
            with stage.cache.static(slots, ends), attention.decoding_with(kernel):
                run(stage, slots)

        # While it is tried nobody takes the pass, so nothing but the slots behind the rows' ends changes.
        takes = seats.takes.clone()
        seats.takes.zero_()
        try:
            return self._record(whole_pass)
        finally:
            seats.takes.copy_(takes)

    def _token_pass(self, state: DecodeState, seats: _Seats, slots: Slots) -> None:
        self._settle(seats, self._run(state, seats, self.backbone.embed(seats.tokens[:, None]), slots), 1)

    def _latent_pass(self, state: DecodeState, seats: _Seats, latents: Tensor, slots: Slots) -> None:
        state.cache.mark(seats.takes[:, None].expand(latents.shape[:2]), slots)
        self._settle(seats, self._run(state, seats, latents, slots), latents.shape[1])

    def _run(self, state: DecodeState, seats: _Seats, embeds: Tensor, slots: Slots) -> Tensor:
        """One pass over the backbone at slots that only the device knows; the newest hidden states `[B, d]`."""
        state.cache.keep_inputs(embeds, slots)
        positions = seats.next_position[:, None] + torch.arange(embeds.shape[1], device=embeds.device)
        return self.backbone.run(state.cache, embeds, slots, positions)[:, -1]

    def _settle(self, seats: _Seats, newest: Tensor, width: int) -> None:
        """What the rows that took the pass have from it, and what comes next."""
        taken, backbone = seats.takes, self.backbone
        seats.logits.copy_(torch.where(taken[:, None], backbone.logits(newest), seats.logits))
        seats.hidden.copy_(torch.where(taken[:, None], newest, seats.hidden))
        entropy = backbone.newest_entropy()
        if entropy is not None:
            seats.entropy.copy_(torch.where(taken, entropy, seats.entropy))
        seats.next_position.add_(taken.long() * width)
        seats.look.copy_(look(seats.logits, seats.entropy))

    def _count(self, state: DecodeState, counts: Sequence[int]) -> None:
        state.encoded = [n + count for n, count in zip(state.encoded, counts, strict=True)]
        state.cache.commit(counts)

    def _kernel(self, state: DecodeState, bucket: int) -> str:
        """The attention of one-token passes: what measured best for this device and shape."""
        keys = state.cache.layers[0].buffers[0].data
        assert keys is not None
        heads = int(self.backbone.config.num_attention_heads)
        return attention.best_kernel(keys[:, :, :bucket], heads)

    def _new_seats(self, rows: int, state: DecodeState) -> _Seats:
        like = {name: self._like(getattr(state, name)) for name in _HELD}
        return _Seats(
            tokens=self._zeros(rows, dtype=torch.long),
            takes=self._zeros(rows, dtype=torch.bool),
            gone=self._zeros(rows, dtype=torch.long),
            look=self._zeros(3, rows, dtype=torch.float32),
            **like,
        )

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(*shape, dtype=dtype or self.backbone.dtype, device=self.backbone.device)

    def _like(self, tensor: Tensor) -> Tensor:
        return self._zeros(*tensor.shape, dtype=tensor.dtype)


@contextmanager
def _recorded(tap: AttentionTap | None) -> Iterator[None]:
    """Inside, the monitor tells no clock and nothing to the host: a recording would not."""
    if tap is None:
        yield
        return
    before = tap.clock, tap.recorded
    tap.clock, tap.recorded = None, True
    try:
        yield
    finally:
        tap.clock, tap.recorded = before


def as_it_is(run: Callable[[], None]) -> Callable[[], None]:
    """A recorder that records nothing: the static passes, run as they come."""
    return run


def compiled(run: Callable[[], None]) -> Callable[[], None]:
    """A recorder that compiles."""
    # Recompilations are counted by code object, and all passes are closures of one: each gets its own.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    fast = torch.compile(own, dynamic=False)
    # It is compiled when it is called for the first time.
    fast()
    return fast


def captured(run: Callable[[], None], pool: Any) -> Callable[[], None]:
    """A recorder that captures a CUDA graph, after a few tries on a stream of its own.

    All graphs of an engine take their intermediates from one pool: they run one after the other, and what they leave
    lies in tensors that are nobody's intermediates.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def new_engine(backbone: Backbone, execution: str) -> Engine:
    """The engine of an execution mode.

    Raises:
        ConfigError: no such mode, or one that the device does not have.
    """
    if execution not in EXECUTIONS:
        raise ConfigError(f"exec is {execution!r}; use one of {', '.join(EXECUTIONS)}.")
    if execution == "eager":
        return Engine(backbone)
    if execution == "graph" and backbone.device.type != "cuda":
        raise ConfigError(f"exec=graph needs a CUDA device, and this is {backbone.device}: use exec=eager or compile.")
    if execution == "compile":
        return StaticEngine(backbone, compiled)
    return StaticEngine(backbone, partial(captured, pool=torch.cuda.graph_pool_handle()))
