"""The bundled backbone's recipe and the weights it left: tokenizer, loss weights, curriculum, resumption,
what it can answer."""

from __future__ import annotations

import gzip
import json
import random
from types import SimpleNamespace

import pytest
import torch

from flashmem_bench.generators import generate
from flashmem_bench.generators.base import split_of
from flashmem_bench.tiny import corpus as corpus_module
from flashmem_bench.tiny import encoding, evaluate, parallel, pretrain, weights_dir
from flashmem_bench.tiny.corpus import COMPOSED_WEIGHT, Corpus, Text
from flashmem_bench.tiny.tokenizer import KEYWORDS, SEPARATORS, build_tokenizer, load_tokenizer

MICRO = pretrain.Recipe(layers=2, width=32, heads=4, kv_heads=2, ffn=48, context=256, warmup=2, autocast=False)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(Corpus().tokenizer_texts(300))


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer(weights_dir())


@pytest.fixture
def data_dir(tmp_path):
    """A data folder with two bAbI stories, one of them also a test story, and forty GSM8K rows."""
    story = {"id": ["1", "2"], "type": [0, 1], "text": ["Mary went home.", "Where is Mary?"], "answer": ["", "home"]}
    other = {**story, "text": ["John went out.", "Where is John?"], "answer": ["", "out"]}
    for name, stories in (("train", [story, other]), ("test", [story])):
        path = tmp_path / "babi" / f"en_{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as out:
            out.writelines(json.dumps({"config": "en-qa1", "story": s}) + "\n" for s in stories)
    (tmp_path / "gsm8k").mkdir()
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(40)
    ]
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(rows[3]) + "\n")
    return tmp_path


@pytest.mark.parametrize("which", ["tokenizer", "shipped"])
def test_words_and_separators_are_single_tokens_and_digits_are_split(which, request):
    tokenizer = request.getfixturevalue(which)
    assert [text for text in (*SEPARATORS, *KEYWORDS) if len(tokenizer.encode(text)) != 1] == []
    assert tokenizer.tokenize("4096") == list("4096")
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("Ana: Bob\nBob -> Ana")]
    assert pieces == ["Ana", ": ", "Bob", "\n", "Bob", " -> ", "Ana"]


@pytest.mark.parametrize("text", ["naïve ünïcode 🙂", "  two  spaces\t\n\n", "don't: a+b = c -> d", "#### 12,5"])
def test_any_text_round_trips(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_the_chat_template_frames_the_prompt_once(shipped):
    ids = shipped.apply_chat_template([{"role": "user", "content": "Ana"}], add_generation_prompt=True)["input_ids"]
    assert shipped.convert_ids_to_tokens(ids) == ["<|begin|>", "<|user|>", "Ana", "<|assistant|>"]
    assert shipped.eos_token == "<|end|>" and shipped.pad_token == "<|pad|>"


def test_only_two_link_values_are_quiet(tokenizer):
    text = next(t for t in (Corpus().text("hops-list", i, 12, 3) for i in range(9)) if t.quiet)
    row = encoding.encode(tokenizer, text)
    target = row.ids[-len(row.weights) :]
    full = max(row.weights)
    quiet = [tokenizer.decode([i]) for i, w in zip(target, row.weights, strict=True) if w < full]
    assert quiet == [line.split(": ")[1] for line in text.target.splitlines() if " twice: " in line]
    assert min(row.weights) == pytest.approx(full * COMPOSED_WEIGHT)


def test_further_turns_ask_what_the_facts_say_and_only_answers_are_learned(tokenizer):
    text = Corpus().text("hops", 0, 12, 3)
    facts = dict(line.split(" -> ") for line in text.prompt.splitlines() if " -> " in line)
    assert len(text.turns) > 1
    assert all(facts[question.removeprefix("One link: ")] == answer for question, answer in text.turns)
    row = encoding.encode(tokenizer, text)
    start = len(row.ids) - len(row.weights)
    learned = [tokenizer.decode([row.ids[start + i]]) for i, weight in enumerate(row.weights) if weight > 0]
    assert learned == [part for answer in (text.target, *(a for _, a in text.turns)) for part in (answer, "<|end|>")]
    chat = [{"role": "user", "content": text.prompt}, {"role": "assistant", "content": text.target}]
    for question, answer in text.turns:
        chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == row.ids


@pytest.mark.parametrize("task", ["hops", "hops-list"])
def test_a_hint_leaves_one_link_to_follow_and_is_not_learned(tokenizer, task):
    for index in range(8):
        text = Corpus().hinted(task, index, 12)
        links = dict(line.split(" -> ") for line in text.prompt.splitlines() if " -> " in line)
        assert text.hints
        for start, name in text.hints:
            assert text.target[start:].split("\n")[0] == links[name]
        row = encoding.encode(tokenizer, text)
        said = list(zip(row.ids[-len(row.weights) :], row.weights, strict=True))
        assert tokenizer.decode([token for token, weight in said if weight > 0]) == text.target + "<|end|>"
        quiet = {tokenizer.decode([token]) for token, weight in said if weight == 0}
        assert quiet - {"\n"} == {name for _, name in text.hints}


def test_half_of_the_guesses_are_the_first_link_and_the_others_are_right():
    for index in range(8):
        text = Corpus().guessed("hops", index, 12)
        links = dict(line.split(" -> ") for line in text.prompt.splitlines() if " -> " in line)
        count, start = text.prompt.splitlines()[-1].split(": ")
        wanted = {"Two links": 2, "Three links": 3, "Four links": 4}[count] if index % 2 else 1
        for _ in range(wanted):
            start = links[start]
        assert text.target == start


@pytest.mark.parametrize("kind", ["hinted", "guessed"])
def test_no_hinted_or_guessed_row_is_a_test_row(kind):
    corpus = Corpus()
    text = getattr(corpus, kind)("hops", 0, 12)
    assert split_of(text.prompt) == "train"
    corpus.held_out.add(corpus_module._digest(text.prompt))
    with pytest.raises(ValueError, match="also a test row"):
        getattr(corpus, kind)("hops", 0, 12)


def test_no_training_row_asks_a_test_question():
    corpus = Corpus()
    drawn = [corpus.text(task, i, 12, 3) for task in ("hops", "hops-list", "recall", "wordmath") for i in range(60)]
    assert {split_of(prompt) for text in drawn for prompt in text.prompts()} == {"train"}
    corpus.held_out.add(corpus_module._digest(drawn[0].prompt))
    with pytest.raises(ValueError, match="also a test row"):
        corpus.text("hops", 0, 12, 3)


def test_auto_tokenizer_reads_the_folder_as_it_is(shipped):
    from transformers import AutoTokenizer

    text = "Ana -> Bob\nHow many pens does Ana have? 12 + 3 = 15"
    assert AutoTokenizer.from_pretrained(weights_dir()).encode(text) == shipped.encode(text)


def test_real_rows_leave_out_test_prompts_and_the_held_out_share(data_dir):
    real = Corpus(data_dir).real
    assert [t.prompt for t in real["babi"]] == ["John went out.\nWhere is John?"]
    questions = [t.prompt.split("\n")[0] for t in real["gsm8k"]]
    assert "What is 3 + 1?" not in questions
    assert "What is 37 + 1?" in questions and not {"What is 38 + 1?", "What is 39 + 1?"} & set(questions)
    assert real["gsm8k"][0] == Text("gsm8k", "What is 0 + 1?" + corpus_module.GSM8K_SUFFIX, "It is 1.\n#### 1")


def test_an_epoch_visits_every_real_row_once(data_dir):
    corpus = Corpus(data_dir)
    rows = len(corpus.real["gsm8k"])
    assert len({corpus.text("gsm8k", i, 2, 1).prompt for i in range(rows, 2 * rows)}) == rows


def test_micro_batches_keep_rows_and_the_token_limit():
    rows = [encoding.Encoded("hops", [1] * length, [1.0]) for length in (10, 11, 12, 40, 41, 100)]
    batches = list(pretrain.micro_batches(rows, 90))
    assert [row for batch in batches for row in batch] == rows
    assert [[len(row.ids) for row in batch] for batch in batches] == [[10, 11, 12], [40, 41], [100]]


def test_look_back_heads_start_on_their_offset(tokenizer):
    model = pretrain.new_model(MICRO, tokenizer)
    model.set_attn_implementation("eager")
    ids = torch.randint(10, 200, (1, 24), generator=torch.Generator().manual_seed(0))
    weights = model(ids, output_attentions=True).attentions[0][0]
    for head in range(2):
        assert (weights[head].argmax(-1)[4:] == torch.arange(4, 24) - head - 1).all()


def test_the_batch_loss_equals_one_row_at_a_time(tokenizer):
    model = pretrain.new_model(MICRO, tokenizer)
    rows = [encoding.encode(tokenizer, Corpus().text(task, 3, 5, 2)) for task in ("hops", "wordmath", "hops-list")]
    together = pretrain.batch_loss(model, rows, tokenizer.pad_token_id)[0]
    apart = sum(pretrain.batch_loss(model, [row], tokenizer.pad_token_id)[0] for row in rows)
    assert torch.allclose(together, apart, rtol=1e-5)


def test_the_curriculum_grows_when_a_task_becomes_easy_and_moves_on_at_its_deadline():
    state = pretrain.Curriculum()
    for _ in range(40):
        state.update({"hops": 0.01, "hops-list": 0.01}, progress=0.1)
    assert state.facts > 4 and state.stage == 0
    stuck = pretrain.Curriculum()
    for _ in range(40):
        stuck.update({"hops": 1.0, "hops-list": 1.0}, progress=0.3)
    assert (stuck.facts, stuck.stage) == (4, 1)


def test_a_resumed_run_gives_the_same_losses(tokenizer, tmp_path):
    def fresh():
        return pretrain.Run(MICRO, pretrain.new_model(MICRO, tokenizer), tokenizer, Corpus(), total_steps=6)

    whole = fresh()
    expected = [whole.train_step() for _ in range(6)]
    first = fresh()
    begun = [first.train_step() for _ in range(3)]
    first.save(tmp_path / "state.safetensors")
    second = fresh()
    second.restore(tmp_path / "state.safetensors")
    assert begun + [second.train_step() for _ in range(3)] == expected
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_a_damaged_state_is_said(tokenizer, tmp_path, damage):
    run = pretrain.Run(MICRO, pretrain.new_model(MICRO, tokenizer), tokenizer, Corpus(), total_steps=1)
    (tmp_path / "state.safetensors").write_bytes(damage)
    with pytest.raises(ValueError, match="remove it to start afresh"):
        run.restore(tmp_path / "state.safetensors")


def _two_steps(argument):
    tokenizer, path = argument
    torch.manual_seed(0)
    run = pretrain.Run(MICRO, pretrain.new_model(MICRO, tokenizer), tokenizer, Corpus(), total_steps=2)
    losses = [run.train_step() for _ in range(2)]
    if parallel.together().main:
        torch.save({"losses": losses, "model": run.model.state_dict()}, path)


def test_two_processes_make_the_step_of_one(tokenizer, tmp_path):
    for count in (1, 2):
        parallel.launch(_two_steps, count, (tokenizer, tmp_path / f"{count}.pt"))
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], atol=1e-3), name


def test_shares_are_disjoint_complete_and_even(monkeypatch):
    pieces = [9, 1, 4, 4, 2, 7, 3]
    found = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "together", lambda rank=rank: SimpleNamespace(rank=rank, world=2))
        found.append(parallel.share(pieces, lambda piece: piece))
    assert sorted(found[0] + found[1]) == sorted(pieces)
    assert abs(sum(found[0]) - sum(found[1])) <= 2


def test_a_state_of_another_recipe_is_refused(tokenizer, tmp_path):
    run = pretrain.Run(MICRO, pretrain.new_model(MICRO, tokenizer), tokenizer, Corpus(), total_steps=2)
    run.save(tmp_path / "state.safetensors")
    run.recipe = pretrain.Recipe()
    with pytest.raises(ValueError, match="another recipe"):
        run.restore(tmp_path / "state.safetensors")


def test_an_exported_model_loads_as_a_plain_hugging_face_folder(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model = pretrain.new_model(MICRO, tokenizer)
    pretrain.export(pretrain.Run(MICRO, model, tokenizer, Corpus(), total_steps=1), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.trained_context == MICRO.context and loaded.config.tie_word_embeddings
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=0.05)


def test_a_pause_is_not_learned_and_moves_nothing_else(tokenizer):
    chance = random.Random(0)
    for task in ("hops", "wordmath", "hops-list"):
        row = encoding.encode(tokenizer, Corpus().text(task, 3, 5, 2))
        for _ in range(30):
            paused = encoding.with_pause(row, chance, range(10, 200), newline=7)
            kept = [i for i, w in enumerate(paused.weights) if w > 0 or paused.weights == row.weights]
            assert [paused.weights[i] for i in kept] == row.weights
            extra = len(paused.ids) - len(row.ids)
            assert 1 <= extra <= encoding.PAUSE_LENGTH and len(paused.weights) == len(row.weights) + extra
            # The answer still follows the prompt, in order, around the pause.
            start = len(paused.ids) - len(paused.weights)
            answer = [paused.ids[start + i] for i in kept]
            assert paused.ids[:start] + answer == row.ids


def test_all_bundled_weights_are_small():
    folder = weights_dir().parent
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 12e6
    card = (weights_dir() / "README.md").read_text()
    assert all(word in card for word in ("trained_context", "CC BY 3.0", "MIT", "flashmem_bench.tiny.pretrain"))


def test_the_shipped_model_answers_one_link_and_not_two(shipped):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(weights_dir(), dtype=torch.float32).eval()
    scores = evaluate.score(model, shipped, "hops", generate("hops", "test", 128))
    assert scores["k=1"][0] > 0.9
    assert max(scores[f"k={k}"][0] for k in (2, 3, 4)) < 0.2
