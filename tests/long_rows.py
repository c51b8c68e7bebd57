"""Made-up rows in the schemas of the data behind the sessions and the long suites."""

from __future__ import annotations

from pathlib import Path

from tests.test_suites import babi_row, write_jsonl

PEOPLE = ("Ana", "Bo")


def conversation(name: str = "conv-1", days: int = 3, turns: int = 4) -> dict:
    """A conversation in LoCoMo's schema, with a question of each category."""
    talk: dict = {"speaker_a": PEOPLE[0], "speaker_b": PEOPLE[1]}
    for day in range(1, days + 1):
        talk[f"session_{day}_date_time"] = f"1:0{day} pm on {day} May, 2023"
        talk[f"session_{day}"] = [
            {"speaker": PEOPLE[n % 2], "dia_id": f"D{day}:{n}", "text": f"On day {day} I bought {n} green kites."}
            for n in range(turns)
        ]
    talk["session_1"][1]["blip_caption"] = "a photo of a kite"
    # A date without a session, as in the data.
    talk[f"session_{days + 1}_date_time"] = "2:00 pm on 9 May, 2023"
    questions = [
        {"question": "What did Ana buy?", "answer": "kites, green paint", "category": 1, "evidence": ["D1:1"]},
        {"question": "When did Bo buy one kite?", "answer": 2023, "category": 2, "evidence": ["D1:1"]},
        {"question": "Would Ana like wind?", "answer": "yes; she has kites", "category": 3, "evidence": []},
        {"question": "How many kites?", "answer": "three", "category": 4, "evidence": ["D1:3"]},
        {"question": "Who sold a boat?", "adversarial_answer": "Bo", "category": 5, "evidence": ["D1:3"]},
    ]
    return {"sample_id": name, "conversation": talk, "qa": questions}


def meeting(number: int = 0, turns: int = 12) -> dict:
    """A meeting in QMSum's schema, with one general and two specific queries."""
    lines = [
        {"speaker": f"Speaker {n % 3}", "content": f"I propose {n} remotes\n in plan {number}."} for n in range(turns)
    ]
    specific = [
        {
            "query": f"What about remote {n}?",
            "answer": f"They proposed {n} remotes.",
            "relevant_text_span": [["0", "1"]],
        }
        for n in (1, 2)
    ]
    return {
        "topic_list": [],
        "general_query_list": [
            {"query": "Summarize the meeting.", "answer": f"Remotes were proposed in plan {number}."}
        ],
        "specific_query_list": specific,
        "meeting_transcripts": lines,
    }


def told_story(task: str, questions: int, statements: int, place: int = 0) -> dict:
    """A story in bAbI's schema: all its statements, then all its questions."""
    told = [f"Mary went to place {place + n}." for n in range(statements)]
    kinds = [0] * statements + [1] * questions
    texts = told + ["Where is Mary?"] * questions
    answers = [""] * statements + [f"place {place + statements - 1}"] * questions
    ids = [str(n + 1) for n in range(len(texts))]
    story = {"id": ids, "type": kinds, "text": texts, "answer": answers, "supporting_ids": [[] for _ in ids]}
    return {"config": f"en-{task}", "story": story}


def book(number: int, sentences: int = 400) -> dict:
    """A book of short sentences in paragraphs."""
    lines = [f"Whale {number} of page {n} swam on." for n in range(sentences)]
    paragraphs = ["\n".join(lines[n : n + 5]) for n in range(0, sentences, 5)]
    return {"id": f"book-{number}", "title": f"Book {number}", "author": "A", "year": 1850, "language": "en",
            "text": "\n\n".join(paragraphs)}  # fmt: skip


def write_long_data(folder: Path) -> Path:
    """Write a few rows of every kind."""
    write_jsonl(folder / "locomo/locomo10.jsonl.gz", [conversation("conv-1"), conversation("conv-2", days=2)])
    write_jsonl(folder / "qmsum/test.jsonl.gz", [meeting(0), meeting(1)])
    write_jsonl(folder / "qmsum/validation.jsonl.gz", [meeting(2)])
    tasks = ("qa1", "qa2", "qa3", "qa4", "qa5")
    write_jsonl(folder / "babi/en_train.jsonl.gz", [babi_row(task, 2, 40 * n) for task in tasks for n in range(20)])
    stories = [babi_row("qa1", 5), babi_row("qa1", 3, 90), told_story("qa2", 3, 6), babi_row("qa3", 1, 30)]
    write_jsonl(folder / "babi/en_test.jsonl.gz", [*stories, babi_row("qa4", 2, 70), babi_row("qa5", 2, 80)])
    write_jsonl(folder / "haystack/public_domain_books.jsonl.gz", [book(n) for n in range(3)])
    return folder
