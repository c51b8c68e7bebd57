"""One history, many questions: a cache that is kept, forked for each question, and saved.

    session = Session(backbone, memory=memory, trigger=TriggerConfig(threshold=2.1))
    session.append(transcript)
    for question in questions:
        answer = session.ask(question, GenerationConfig(max_new_tokens=64))

The base is token ids: `extend` encodes ids behind what is there, `generate` answers from there. On top of it lies text:
`append` adds to a conversation, which is rendered through the chat template and must go on as the ids that are encoded
already. Where it does not (a border between two texts that became one token, the end mark of a turn that goes on, an
answer that the tokenizer would have cut otherwise), the session goes back to where both part and encodes from there,
so that its ids are always exactly those of the whole conversation; memories behind that place are lost.

Nothing is ever encoded twice otherwise, and the numbers say so: `encoded` counts what went through the backbone for
this session, `reused` what it took over when it was forked or loaded. Cooldown and cap of a trigger begin anew with
each answer. A session is one row; for batches of unrelated prompts there is `flashmem.generate`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from flashmem.backbone import Backbone
from flashmem.errors import CheckpointError, ConfigError, PromptTooLongError
from flashmem.generation import Clock, Generation, generate
from flashmem.integrity import file_hash, require_hash, require_seal, sealed
from flashmem.memory import MemorySource
from flashmem.state import DecodeState
from flashmem.token_ids import common_length
from flashmem.trigger import TriggerConfig

FORMAT_VERSION = 2
_RECORD = "session.json"
_MEND = "copy the session again, or begin a new one"


class Session:
    """A history in the backbone's cache, its memories included.

    Args:
        backbone: the frozen model.
        memory: who writes memories into the history while it answers; None decodes plainly.
        trigger: when; None is never.
        sampling_logits: as in `flashmem.generate`.

    Raises:
        ConfigError: a memory that drops the cache, which is what a session keeps.
    """

    def __init__(
        self,
        backbone: Backbone,
        memory: MemorySource | None = None,
        trigger: TriggerConfig | None = None,
        sampling_logits: Literal["post", "pre"] = "post",
    ) -> None:
        if memory is not None and memory.drops_cache:
            raise ConfigError("This memory drops the cache that a session keeps: use one with cached=True.")
        self.backbone, self.memory, self.trigger = backbone, memory, trigger
        self.sampling_logits = sampling_logits
        self._state = backbone.empty_state(1, keep_inputs=memory is not None and memory.needs_history)
        # The newest ids, `_waiting` of them, are not encoded yet: the last token of an answer never is.
        self._ids: list[int] = []
        self._waiting = 0
        self._turns: list[dict[str, str]] = []

    @property
    def token_ids(self) -> list[int]:
        """The text of the history, latents not among it."""
        return list(self._ids)

    @property
    def turns(self) -> list[dict[str, str]]:
        """The conversation, where the session was made of texts: `role` and `content`."""
        return [dict(turn) for turn in self._turns]

    @property
    def encoded(self) -> int:
        """Positions that went through the backbone for this session."""
        return self._state.encoded[0]

    @property
    def reused(self) -> int:
        """Positions that it took over when it was forked or loaded."""
        return self._state.reused[0]

    @property
    def positions(self) -> int:
        """Positions in the cache, latents included."""
        return self._state.length

    @property
    def latents(self) -> int:
        """Latents in the cache."""
        return int(self._state.latents.sum())

    @property
    def logits(self) -> torch.Tensor:
        """`[V]` after the newest encoded position, float32."""
        return self._state.logits[0]

    @property
    def entropy(self) -> float:
        """Monitored entropy of the newest encoded position, nats."""
        return float(self._state.entropy[0])

    def extend(self, token_ids: list[int]) -> None:
        """Encode token ids behind the history.

        Raises:
            ConfigError: the session was begun with texts.
            PromptTooLongError: the history would exceed the backbone's positions.
        """
        self._require_tokens()
        self._grow([*self._ids, *token_ids])

    def append(self, text: str, role: str = "user") -> None:
        """Add a text to the conversation and encode what is new.

        Texts of one role in a row are one turn, joined as they are. Without a chat template all texts are joined.

        Raises:
            ConfigError: the session was begun with token ids.
            PromptTooLongError: the history would exceed the backbone's positions.
        """
        turns = self._with(text, role)
        self._grow(self.backbone.encode_turns(turns, answer=False))
        self._turns = turns

    def ask(
        self,
        question: str | list[int],
        config: GenerationConfig,
        *,
        seed: int | None = None,
        clock: Clock | None = None,
    ) -> Generation:
        """Answer a question about the history; the session itself stays as it is.

        Args:
            question: a text, which goes on with the turn of the user, or token ids.
            config: length, EOS ids, stop strings, sampling.
            seed: for sampling.
            clock: times the phases of the answer.

        Returns:
            The answer; its `positions_encoded` are the question, the answer and its latents, its `positions_reused` the
            history.
        """
        fork = self.fork()
        if isinstance(question, str):
            fork._turns = fork._with(question, "user")
            return fork.generate(config, seed=seed, clock=clock)
        fork._require_tokens()
        return fork._answer([*fork._ids, *question], config, seed, clock)

    def generate(self, config: GenerationConfig, *, seed: int | None = None, clock: Clock | None = None) -> Generation:
        """Answer from where the history stands; the answer and its memories become part of it.

        Raises:
            ConfigError: the history is empty, or settings that do not fit together.
            PromptTooLongError: history and answer budget exceed the backbone's positions.
        """
        ids = self.backbone.encode_turns(self._turns, answer=True) if self._turns else self.token_ids
        answer = self._answer(ids, config, seed, clock)
        if self._turns:
            self._turns = [*self._turns, {"role": "assistant", "content": answer.text}]
        return answer

    def fork(self) -> Session:
        """A session that goes on from here by itself. Nothing is copied; what it encodes is counted from 0."""
        other = Session(self.backbone, self.memory, self.trigger, self.sampling_logits)
        other._state = self._state.fork()
        other._ids, other._waiting, other._turns = list(self._ids), self._waiting, self.turns
        return other

    @torch.inference_mode()
    def save(self, path: str | Path) -> None:
        """Write the session into a folder, made if it is missing: tensors, and a record that names them.

        The record is replaced last and in one step, so the folder holds the old session or the new one, whole.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().clone() for k, v in self._state.exported().items()}
        partial = folder / "state.partial"
        save_file(tensors, partial)
        digest = file_hash(partial)
        partial.replace(folder / f"state-{digest[:16]}.safetensors")
        record = {**self._record(), "tensors": f"state-{digest[:16]}.safetensors", "sha256": digest}
        partial = folder / f"{_RECORD}.partial"
        partial.write_text(json.dumps(sealed(record), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / _RECORD)
        for old in set(folder.glob("state-*.safetensors")) - {folder / str(record["tensors"])}:
            old.unlink()

    @classmethod
    def load(
        cls,
        path: str | Path,
        backbone: Backbone,
        memory: MemorySource | None = None,
        trigger: TriggerConfig | None = None,
        sampling_logits: Literal["post", "pre"] = "post",
    ) -> Session:
        """Resume a saved session; nothing is encoded again.

        Args:
            path: the folder.
            backbone: the same backbone, in the same dtype.
            memory: as in `Session`; a memory that reads the history needs a session that was saved with one.
            trigger: as in `Session`.
            sampling_logits: as in `Session`.

        Raises:
            CheckpointError: no session, a damaged one, or one of another backbone.
            ConfigError: the memory needs what the session did not keep.
        """
        folder, session = Path(path), cls(backbone, memory, trigger, sampling_logits)
        record = _read_record(folder)
        theirs, ours = record["backbone"], session._record()["backbone"]
        if (theirs["fingerprint"], theirs["dtype"]) != (ours["fingerprint"], ours["dtype"]):
            raise CheckpointError(
                f"{folder} is a session of {theirs['name']} ({theirs['fingerprint']}, {theirs['dtype']}), not of "
                f"{ours['name']} ({ours['fingerprint']}, {ours['dtype']}): load that model, or begin a new session."
            )
        state = backbone.import_state(_read_tensors(folder / Path(record["tensors"]).name, record["sha256"]))
        if session._state.keeps_inputs and not state.keeps_inputs and state.length:
            raise ConfigError("This memory reads the whole history, which the session did not keep: begin a new one.")
        session._state = state
        session._ids, session._waiting = list(record["token_ids"]), record["waiting"]
        session._turns = record["turns"]
        return session

    def _with(self, text: str, role: str) -> list[dict[str, str]]:
        """The conversation with one more text."""
        if self._ids and not self._turns:
            raise ConfigError("This session is made of token ids: go on with extend, or begin another one.")
        turns = self.turns
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += text
        else:
            turns.append({"role": role, "content": text})
        return turns

    def _require_tokens(self) -> None:
        if self._turns:
            raise ConfigError("This session is a conversation of texts: go on with append, or begin another one.")

    def _answer(
        self, token_ids: list[int], config: GenerationConfig, seed: int | None, clock: Clock | None
    ) -> Generation:
        """Make the history these ids and answer; the counts of the answer are those of this call alone."""
        if not token_ids:
            raise ConfigError("The history is empty: append a text or token ids first.")
        self._require_room(len(token_ids) + self.latents + (config.max_new_tokens or 0))
        # Answered in a fork: its counts are those of this call, and a failure leaves the session as it was.
        before = self._state, self._ids, self._waiting
        self._state = self._state.fork()
        try:
            (answer,) = generate(
                self.backbone,
                [token_ids],
                generation_config=config,
                memory=self.memory,
                trigger=self.trigger if self.memory is not None else None,
                sampling_logits=self.sampling_logits,
                seed=seed,
                clock=clock,
                prefill=lambda _: self._continue(token_ids),
            )
        except BaseException:
            self._state, self._ids, self._waiting = before
            raise
        self._count_on(before[0])
        self._state.reused = [min(before[0].reused[0], self.reused)]
        self._ids, self._waiting = self._ids + answer.token_ids, 1
        return answer

    def _grow(self, token_ids: list[int]) -> None:
        """Encode under the monitor: a memory right behind the last token needs its entropy."""
        self.backbone.observe(self.memory is not None)
        try:
            self._continue(token_ids)
        finally:
            self.backbone.observe(False)

    @torch.inference_mode()
    def _continue(self, token_ids: list[int]) -> DecodeState:
        """Make the history exactly these ids, encoding what is not encoded yet."""
        held = len(self._ids) - self._waiting
        common = common_length(self._ids[:held], token_ids)
        if common < held:
            # The logits behind that place must be made again: at least one token goes through the backbone.
            common = min(common, len(token_ids) - 1)
            self._rewind(common)
        fresh = token_ids[common:]
        self._require_room(self.positions + len(fresh))
        if fresh and self.positions:
            self.backbone.append(self._state, [fresh])
        elif fresh:
            old = self._state
            self._state = self.backbone.prefill([fresh], keep_inputs=old.keeps_inputs)
            self._count_on(old)
        self._ids, self._waiting = list(token_ids), 0
        return self._state

    def _count_on(self, old: DecodeState) -> None:
        """Take over the counts of the state that a new one stands for."""
        self._state.encoded[0] += old.encoded[0]
        self._state.woven[0] += old.woven[0]

    def _rewind(self, tokens: int) -> None:
        """Keep the first tokens of the text and the latents between them; drop the rest."""
        state = self._state
        state.kept = {}
        if tokens < 1:
            self._state = self.backbone.empty_state(1, keep_inputs=state.keeps_inputs)
            return self._count_on(state)
        slots = (~state.latents[0]).nonzero()[:, 0]
        state.crop([int(slots[tokens - 1]) + 1])
        state.reused = [min(self.reused, self.positions)]
        return None

    def _require_room(self, positions: int) -> None:
        room = self.backbone.max_positions
        if positions > room:
            raise PromptTooLongError(
                f"The session needs {positions} positions and {self.backbone.name} has {room}: begin a new one with a "
                "shorter history."
            )

    def _record(self) -> dict[str, Any]:
        state: DecodeState = self._state
        return {
            "format_version": FORMAT_VERSION,
            "backbone": {
                "name": self.backbone.name,
                "fingerprint": self.backbone.fingerprint,
                "dtype": str(self.backbone.dtype).removeprefix("torch."),
            },
            "token_ids": self._ids,
            "waiting": self._waiting,
            "turns": self._turns,
            "latents": state.latents[0].nonzero()[:, 0].tolist(),
        }


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        version = record["format_version"]
        record["backbone"]["fingerprint"], record["backbone"]["dtype"], record["backbone"]["name"]
        record["token_ids"], record["waiting"], record["turns"], record["tensors"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a session: {_RECORD} is missing or damaged.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has session format {version}; this version reads {FORMAT_VERSION}.")
    require_seal(record, folder / _RECORD, _MEND)
    return record


def _read_tensors(path: Path, digest: str) -> dict[str, torch.Tensor]:
    try:
        require_hash(path, digest, file_hash(path), _MEND)
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {_MEND}.") from error
