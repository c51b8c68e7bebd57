"""Train the bundled backbone from scratch: `python -m flashmem_bench.tiny.pretrain --minutes 74 --processes 2`.

The recipe is a curriculum, because a mixture of all tasks from the first step learns nothing in the time that
two cores have. Look-ups come first, growing from four facts as their loss falls; word problems join, from
one step to three; bAbI and GSM8K join third; the fourth stage gives most rows to what is hardest; in the last one the
pauses of some look-ups say the last link but one, so that such a slot can also help. Earlier tasks stay in the
mix. From the second stage on, many rows hold a pause, so that slots without meaning do no harm.

Four things make look-ups form within a minute: two heads of the first layer start out as look-back heads; hidden
matrices are trained with Muon (embeddings, biases and norms with AdamW); a conversation asks several questions about
the same facts; and the chat template puts a question's last word right before the answer. Rows of a step are sorted
by length and cut into micro-batches, since padding would otherwise be half of the work.

Answers that need two links and more are never learned without a hint: the model answers them with the first link, and
what is left to do is there for a memory.

Training resumes by the same command after any interruption: model, optimizer, curriculum and random state are
saved every minute, and a batch depends on nothing else. With `--steps` alone the losses are the same as
without the interruption; with `--minutes` the schedule follows the clock, so that a slow machine still ends
its curriculum.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from flashmem_bench.tiny import parallel, weights_dir
from flashmem_bench.tiny.corpus import Corpus
from flashmem_bench.tiny.encoding import Encoded, encode, pause_rows
from flashmem_bench.tiny.resume import read_state, write_state
from flashmem_bench.tiny.sums import write_sums
from flashmem_bench.tiny.tokenizer import VOCAB_SIZE, build_tokenizer, load_tokenizer

# Rows a step takes from each task, by stage.
STAGES: tuple[dict[str, int], ...] = (
    {"hops-list": 24, "hops": 28, "recall": 12},
    {"wordmath": 40, "hops-list": 8, "hops": 10, "recall": 6},
    {"wordmath": 22, "hops-list": 8, "hops": 8, "recall": 6, "babi": 24, "gsm8k": 4},
    {"wordmath": 24, "hops-list": 20, "hops": 5, "recall": 4, "babi": 28, "gsm8k": 2},
    {"wordmath": 20, "hops-list": 16, "hops": 6, "recall": 6, "babi": 24, "gsm8k": 2},
)
# Rows that the last stage takes besides: with hints, and guesses.
HINTED_ROWS, GUESSED_ROWS = {"hops": 12, "hops-list": 8}, {"hops": 8}
# Share of the budget after which a stage ends although its goal is not reached.
STAGE_DEADLINES = (0.23, 0.38, 0.42, 0.77)
# From the second stage on, this share of the rows holds a pause (see `encoding.with_pause`), in the last ones most.
PAUSE_SHARES = (0.0, 0.4, 0.4, 0.7, 0.7)
MAX_FACTS, MAX_STEPS = 12, 3
STATE_FILE = "state.safetensors"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. `context` is the longest row in tokens and becomes
    `trained_context`.
    """

    layers: int = 6
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    vocab_size: int = VOCAB_SIZE
    context: int = 512
    lr: float = 2e-3
    matrix_lr: float = 0.02
    warmup: int = 20
    look_back: float = 5.0
    decay_from: float = 0.75
    clip: float = 1.0
    micro_tokens: int = 3072
    autocast: bool = True
    seed: int = 0


@dataclass
class Curriculum:
    """What the rows look like now, and how well that goes (running loss in nats a token, by task)."""

    stage: int = 0
    facts: int = 4
    steps: int = 1
    since: int = 0
    losses: dict[str, float] = field(default_factory=dict)

    def update(self, losses: dict[str, float], progress: float) -> None:
        """Note the losses of a step, then make the rows harder where they have become easy."""
        for task, loss in losses.items():
            self.losses[task] = 0.9 * self.losses.get(task, loss) + 0.1 * loss
        self.since += 1
        if self.since < 15:
            return
        links = self.losses.get("hops", math.inf) < 0.1 and self.losses.get("hops-list", math.inf) < 0.25
        if self.facts < MAX_FACTS and links:
            self.facts, self.since = self.facts + 1, 0
        if self.stage > 0 and self.steps < MAX_STEPS and self.losses.get("wordmath", math.inf) < 0.25:
            self.steps, self.since = self.steps + 1, 0
        reached = (
            self.facts >= MAX_FACTS and self.losses.get("hops", math.inf) < 0.15,
            self.steps >= MAX_STEPS,
            False,
            False,
        )
        if self.stage < len(STAGE_DEADLINES) and (
            (reached[self.stage] and self.since > 60) or progress > STAGE_DEADLINES[self.stage]
        ):
            self.stage, self.since = self.stage + 1, 0
            self.steps = MAX_STEPS if self.stage == 2 else self.steps


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of the recipe's size."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        trained_context=recipe.context,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    for head in range(2):
        _look_back(model, head, head + 1, recipe.look_back)
    return model


@torch.no_grad()
def _look_back(model: Qwen2ForCausalLM, head: int, offset: int, strength: float) -> None:
    """Start a head of the first layer out as one that attends to the token `offset` places back.

    Constant query and key biases become a preference for one distance once they are rotated. Look-ups are
    built on such heads, and finding them from a random start takes longer than all the rest.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    size = config.hidden_size // config.num_attention_heads
    kv_head = head * config.num_key_value_heads // config.num_attention_heads
    angle = offset * model.model.rotary_emb.inv_freq
    query = torch.cat([torch.cos(angle), -torch.sin(angle)])
    key = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)])
    attention.q_proj.bias[head * size : (head + 1) * size] = strength * query
    attention.k_proj.bias[kv_head * size : (kv_head + 1) * size] = strength * key


def step_rows(corpus: Corpus, tokenizer, recipe: Recipe, curriculum: Curriculum, step: int) -> list[Encoded]:
    """The rows of one step, shortest first; rows beyond the context are left out."""
    rows = []
    for task, count in STAGES[curriculum.stage].items():
        if task in ("babi", "gsm8k") and task not in corpus.real:
            continue
        for index in range(step * count, (step + 1) * count):
            rows.append(encode(tokenizer, corpus.text(task, index, curriculum.facts, curriculum.steps)))
    if curriculum.stage == len(STAGES) - 1:
        for draw, counts in ((corpus.hinted, HINTED_ROWS), (corpus.guessed, GUESSED_ROWS)):
            for task, count in counts.items():
                texts = (draw(task, index, MAX_FACTS) for index in range(step * count, (step + 1) * count))
                rows += [encode(tokenizer, text) for text in texts]
    return sorted((row for row in rows if len(row.ids) <= recipe.context), key=lambda row: len(row.ids))


def micro_batches(rows: list[Encoded], limit: int) -> Iterator[list[Encoded]]:
    """Cut sorted rows into batches of at most `limit` padded tokens and of similar length."""
    batch: list[Encoded] = []
    for row in rows:
        if batch and ((len(batch) + 1) * len(row.ids) > limit or len(row.ids) > 1.6 * len(batch[0].ids) + 8):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def padded_tokens(batch: list[Encoded]) -> int:
    """What a batch costs: its tokens with the padding."""
    return len(batch) * max(len(row.ids) for row in batch)


def batch_loss(model: Qwen2ForCausalLM, rows: list[Encoded], pad: int) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Weighted loss summed over the target tokens of `rows`, and each task's unweighted losses of full-weight
    tokens.

    Rows are padded on the right: under a causal mask no real token sees the padding, so no mask is needed.
    """
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [pad] * (longest - len(row.ids)) for row in rows], device=model.device)
    where = [
        (i, len(row.ids) - len(row.weights) + j - 1) for i, row in enumerate(rows) for j in range(len(row.weights))
    ]
    batch, place = torch.tensor(where, device=model.device).T
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[batch, place]
    each = F.cross_entropy(model.lm_head(hidden).float(), ids[batch, place + 1], reduction="none")
    weights = torch.tensor([w for row in rows for w in row.weights], device=model.device)
    seen: dict[str, list[float]] = {}
    flat = iter(each.detach().tolist())
    for row in rows:
        full = max(row.weights)
        values = [next(flat) for _ in row.weights]
        seen.setdefault(row.task, []).extend(v for v, w in zip(values, row.weights, strict=True) if w == full)
    return (each * weights).sum(), seen


@dataclass
class Run:
    """A training run that can be stopped and continued."""

    recipe: Recipe
    model: Qwen2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    total_steps: int
    minutes: float | None = None
    step: int = 0
    elapsed: float = 0.0
    curriculum: Curriculum = field(default_factory=Curriculum)

    def __post_init__(self) -> None:
        embeddings = self.model.get_input_embeddings().weight
        matrices = [p for p in self.model.parameters() if p.ndim > 1 and p is not embeddings]
        others = [p for p in self.model.parameters() if p.ndim <= 1 or p is embeddings]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=self.recipe.matrix_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=self.recipe.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    @property
    def progress(self) -> float:
        """Share of the budget that is used, by steps or by the clock, whichever is further."""
        return max(self.step / self.total_steps, self.elapsed / (60 * self.minutes) if self.minutes else 0.0)

    def rate(self) -> float:
        """Factor on the learning rates: warm-up, plateau, then linear decay to a fiftieth."""
        recipe = self.recipe
        tail = max(0.0, (self.progress - recipe.decay_from) / (1 - recipe.decay_from))
        return min(1.0, (self.step + 1) / recipe.warmup) * (1 - 0.98 * min(1.0, tail))

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the mean loss of each task."""
        started = time.monotonic()
        rows = step_rows(self.corpus, self.tokenizer, self.recipe, self.curriculum, self.step)
        if share := PAUSE_SHARES[self.curriculum.stage]:
            rows = pause_rows(rows, self.tokenizer, share, self.recipe.seed, self.step)
        total = sum(sum(row.weights) for row in rows)
        seen: dict[str, list[float]] = {}
        for batch in parallel.share(list(micro_batches(rows, self.recipe.micro_tokens)), padded_tokens):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.autocast):
                loss, values = batch_loss(self.model, batch, self.tokenizer.pad_token_id)
            (loss / total).backward()
            for task, some in values.items():
                seen.setdefault(task, []).extend(some)
        parallel.sum_gradients(self.model)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer, lr in zip(self.optimizers, (self.recipe.matrix_lr, self.recipe.lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * self.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses = parallel.means(seen, (*STAGES[-1], "hints", "guesses"))
        self.step += 1
        self.elapsed = parallel.agreed(self.elapsed + time.monotonic() - started)
        self.curriculum.update(losses, self.progress)
        return losses

    def save(self, path: Path) -> None:
        """Write everything needed to go on, atomically."""
        state = {
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "curriculum": asdict(self.curriculum),
            "step": self.step,
            "elapsed": self.elapsed,
            "rng": torch.get_rng_state(),
        }
        write_state(path, state)

    def restore(self, path: Path) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state belongs to another recipe, or is damaged.
        """
        state = read_state(path)
        if state["recipe"] != json.loads(json.dumps(asdict(self.recipe))):
            raise ValueError(f"{path} belongs to another recipe; remove it to start afresh")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.curriculum = Curriculum(**state["curriculum"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        torch.set_rng_state(state["rng"])

    def train(self, on_minute: Callable[[dict], None]) -> None:
        """Train until the budget is used, calling `on_minute` about once a minute and at the end."""
        self.model.train()
        last = self.elapsed
        while self.progress < 1:
            losses = self.train_step()
            if self.elapsed - last >= 60 or self.progress >= 1:
                last = self.elapsed
                on_minute(
                    {
                        "step": self.step,
                        "minutes": round(self.elapsed / 60, 2),
                        **asdict(self.curriculum),
                        "now": losses,
                    }
                )


def export(run: Run, folder: Path) -> None:
    """Write a plain Hugging Face folder in bfloat16, and beside it what the weights were trained with."""
    folder.mkdir(parents=True, exist_ok=True)
    clone = Qwen2ForCausalLM(run.model.config)
    clone.load_state_dict(run.model.state_dict())
    clone.to(torch.bfloat16).save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    provenance = {
        "recipe": asdict(run.recipe),
        "curriculum": asdict(run.curriculum),
        "steps": run.step,
        "minutes": round(run.elapsed / 60, 1),
        "real_rows": {task: len(texts) for task, texts in run.corpus.real.items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "training.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    write_sums(folder)


def prepare(recipe: Recipe, data_dir: Path | None, state_dir: Path, steps: int, minutes: float | None) -> Run:
    """A run that starts afresh, or goes on where the state in `state_dir` stops."""
    corpus = Corpus(data_dir, recipe.seed)
    if (state_dir / "tokenizer").exists():
        tokenizer = load_tokenizer(state_dir / "tokenizer")
    else:
        tokenizer = build_tokenizer(corpus.tokenizer_texts(), recipe.vocab_size)
        tokenizer.save_pretrained(state_dir / "tokenizer")
    run = Run(recipe, new_model(recipe, tokenizer), tokenizer, corpus, steps, minutes)
    if (state_dir / STATE_FILE).exists():
        run.restore(state_dir / STATE_FILE)
    return run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled backbone from scratch; the same command resumes.")
    parser.add_argument("--minutes", type=float, default=None, help="time budget of all attempts together")
    parser.add_argument("--steps", type=int, default=6000, help="step budget")
    parser.add_argument("--out", type=Path, default=weights_dir(), help="folder for the finished model")
    parser.add_argument("--state-dir", type=Path, default=Path("build/tiny"), help="folder for state and log")
    parser.add_argument(
        "--data-dir", type=Path, default=os.environ.get("FLASHMEM_DATA"), help="real bAbI and GSM8K files"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="processes that share each step, one thread each")
    for name, value in asdict(Recipe()).items():
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **kind)
    return parser.parse_args()


def main() -> None:
    """Train within the budget and export the model."""
    args = _arguments()
    parallel.launch(_train, args.processes, args)


def _train(args: argparse.Namespace) -> None:
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    data_dir = Path(args.data_dir) if args.data_dir else None
    args.state_dir.mkdir(parents=True, exist_ok=True)
    run = prepare(recipe, data_dir, args.state_dir, args.steps, args.minutes)
    missing = [task for task in ("babi", "gsm8k") if task not in run.corpus.real]
    if missing and parallel.together().main:
        print(f"training without {' and '.join(missing)}: no --data-dir with their train files")
    run.model.to(args.device)

    def note(line: dict) -> None:
        if not parallel.together().main:
            return
        run.save(args.state_dir / STATE_FILE)
        with open(args.state_dir / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    run.train(note)
    if parallel.together().main:
        export(run, args.out)
        print(f"{run.step} steps in {run.elapsed / 60:.1f} minutes; model in {args.out}")


if __name__ == "__main__":
    main()
