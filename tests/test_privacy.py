"""Nothing that is stored or reported names a secret, a user, a machine or a home folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashmem_bench.cli import run as command
from flashmem_bench.errors import sentence
from flashmem_bench.privacy import HIDDEN, redact, redacted

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted01",
    "WANDB_API_KEY": "planted0123456789planted",
    "AWS_SECRET_ACCESS_KEY": "Planted/Secret+Access=Key",
    "MY_SERVICE_PASSWORD": "correct-planted-horse",
}


@pytest.fixture
def planted(monkeypatch, tmp_path: Path) -> Path:
    """A user with a name, a machine with a name, a home folder and secrets in the environment."""
    home = tmp_path / "home" / "plantedname"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "plantedname")
    monkeypatch.setattr("socket.gethostname", lambda: "plantedhost-17")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return home


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("run --set hub.token=abc --limit 3", "run --set hub.token=*** --limit 3"),
        ("--api-key abc y", "--api-key *** y"),
        ("--api-key=abc y", "--api-key=*** y"),
        ('{"password": "abc"}', '{"password": "***"}'),
        ("https://me:abc@example.org/x", "https://***@example.org/x"),
        ("git+ssh://abc@example.org", "git+ssh://***@example.org"),
        ("ghp_0123456789012345678901", "***"),
        ("Bearer eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "Bearer ***"),
        ("max_new_tokens=5 and 3 tokens: many", "max_new_tokens=5 and 3 tokens: many"),
        ("they part at token 3 of 5", "they part at token 3 of 5"),
        ("--monitor.sinks=4 --set trigger.kind=never", "--monitor.sinks=4 --set trigger.kind=never"),
    ],
)
def test_what_is_taken_out_and_what_stays(text: str, wanted: str) -> None:
    assert redact(text) == wanted


def test_people_and_machines_are_not_named(planted: Path) -> None:
    assert redact(f"--data-dir {planted}/data") == "--data-dir ~/data"
    assert redact(f"--data-dir={planted}") == "--data-dir=~"
    assert redact(f"{planted}two/data").endswith("plantednametwo/data")
    assert redact("/scratch/plantedname/x plantedname@plantedhost-17") == "/scratch/<user>/x <user>@<host>"
    assert redact("a plantedname of three") == "a plantedname of three"


@given(st.sampled_from(sorted(SECRETS.values())), st.text(max_size=20), st.text(max_size=20))
def test_a_secret_of_the_environment_is_found_in_any_text(secret: str, before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        assert secret not in redact(f"{before}{secret}{after}")
        assert secret not in json.dumps(redacted({"a": [f"{before}{secret}", 3, None]}), ensure_ascii=False)
        assert secret not in sentence(ValueError(f"{before}{secret}{after}"))


def test_redacting_twice_changes_nothing_more() -> None:
    line = f"--token {'x' * 8} https://a:b@c/ /home/somebody/x"
    assert redact(redact(line)) == redact(line) and HIDDEN in redact(line)


def test_no_secret_reaches_the_results_or_the_report(bench, planted: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from flashmem_bench.methods.latent import LatentMethod

    results, given_ = bench.results(planted / "results"), "planted-in-a-setting"

    def fail(self, *arguments, **more):
        raise OSError(f"https://me:{SECRETS['HF_TOKEN']}@hub.example refused {planted}/cache on plantedhost-17")

    monkeypatch.setattr(LatentMethod, "generate", fail)
    checkpoint = results / "checkpoints" / bench.model.name / "joint" / "flashmem" / "seed0"
    line = ["run", "--suite", "hops", "--method", "flashmem", "--model", str(bench.model), "--limit", "2",
            "--checkpoint", str(checkpoint), "--results-dir", str(results)]  # fmt: skip
    # The shell's view of the line has more than what is parsed here, as with a wrapper around the program.
    typed = [
        *line,
        "--set",
        f"hub.token={given_}",
        "--data-dir",
        f"https://me:{given_}@host/x",
        SECRETS["WANDB_API_KEY"],
    ]
    monkeypatch.setattr("sys.argv", ["flashmem-bench", *typed])
    assert command([*line, "--json"]) == 1
    assert command(["report", "--results-dir", str(results)]) in (0, 1)
    assert command(["latency", "--method", "vanilla,flashmem", "--contexts", "64", "--runs", "5", "--model",
                    str(bench.model), "--results-dir", str(results), "--quiet"]) in (0, 1)  # fmt: skip
    capsys.readouterr()
    forbidden = [*SECRETS.values(), given_, "plantedname", "plantedhost", str(tmp_path)]
    stored = [path for path in results.rglob("*") if path.is_file()]
    assert any(path.name == "samples.jsonl" and path.stat().st_size for path in stored)
    for path in stored:
        content = path.read_bytes()
        assert not [word for word in forbidden if word.encode() in content], path
    assert any(b"~/cache" in path.read_bytes() for path in stored), "the error itself is kept"


def test_the_terminal_shows_the_command_as_it_was_typed(monkeypatch) -> None:
    from flashmem_bench.cli.options import command_line, recorded_command

    monkeypatch.setattr("sys.argv", ["flashmem-bench", "run", "--data-dir", os.path.expanduser("~/data")])
    assert command_line() == f"flashmem-bench run --data-dir {os.path.expanduser('~/data')}"
    assert recorded_command() == "flashmem-bench run --data-dir ~/data"
