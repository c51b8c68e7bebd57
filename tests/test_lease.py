"""One process at a time holds a claim, however they race, die, sleep or fork."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmem_bench import lease
from flashmem_bench.cell_store import CellStore
from flashmem_bench.errors import StoreError
from flashmem_bench.lease import Claim, ClaimHeld
from flashmem_bench.process_identity import machine_digest, process_start
from flashmem_bench.store import ResultStore

HOLD = """
    import sys
    from pathlib import Path
    from flashmem_bench.lease import Claim
    claim = Claim.take(Path(sys.argv[1]))
    print("held", flush=True)
    if sys.stdin.readline() == "release\\n":
        claim.release()
"""

# Every round: the winner of the last one is gone without a word, and six processes want its claim at the same moment.
RACE = """
    import os, sys
    from pathlib import Path
    from flashmem_bench.lease import Claim, ClaimHeld

    folder, rounds, contenders = Path(sys.argv[1]), int(sys.argv[2]), 6

    def contend(start, answers, leave):
        os.read(start, 1)
        try:
            claim = Claim.take(folder)
            answer = b"w" if claim.is_held() else b"?"
        except ClaimHeld:
            answer = b"h"
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            answer = b"e"
        os.write(answers, answer)
        os.read(leave, 1)
        os._exit(0)

    for _ in range(rounds):
        pipes = [os.pipe() for _ in range(3)]
        (start, go), (read, answers), (leave, free) = pipes
        children = []
        for _ in range(contenders):
            child = os.fork()
            if child == 0:
                contend(start, answers, leave)
            children.append(child)
        os.write(go, b"x" * contenders)
        found = b""
        while len(found) < contenders:
            found += os.read(read, contenders)
        os.write(free, b"x" * contenders)
        for child in children:
            os.waitpid(child, 0)
        for pipe in pipes:
            for end in pipe:
                os.close(end)
        print(bytes(sorted(found)).decode(), flush=True)
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def holder(folder: Path) -> subprocess.Popen[str]:
    process = start(HOLD, folder)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str], word: str = "release\n") -> None:
    process.communicate(word)
    assert process.returncode == 0


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".claim*"))


def owner(folder: Path, number: int = 1, age_s: float = 0.0, **told: Any) -> Path:
    """Write a claim of somebody else by hand."""
    path = folder / f".claim.{number:08d}"
    path.mkdir()
    document = {"token": "t", "pid": 1, "started": "ticks 1", "machine": "0" * 16, "expiry_s": 60.0, **told}
    (path / "owner.json").write_text(json.dumps(document))
    # Ages are told by the file system's clock, as in the program.
    now = (path / "owner.json").stat().st_mtime
    os.utime(path / "owner.json", (now - age_s, now - age_s))
    return path


def test_of_many_that_want_a_stale_claim_exactly_one_gets_it(tmp_path: Path, tally: Callable[..., None]) -> None:
    process = start(RACE, tmp_path, 40)
    out, errors = process.communicate()
    assert not errors
    assert out.split() == ["hhhhhw"] * 40
    tally("six processes want a stale claim", 40)
    assert claims(tmp_path) == [".claim.00000040"], "what was taken over is removed"


def test_a_second_process_is_refused_and_told_whom_it_waits_for(tmp_path: Path) -> None:
    first = holder(tmp_path)
    with pytest.raises(ClaimHeld) as caught:
        Claim.take(tmp_path)
    assert caught.value.pid == first.pid and caught.value.advice == "wait for it to end"
    end(first)
    Claim.take(tmp_path).release()


@pytest.mark.parametrize("word", ["release\n", "end without a word\n"])
def test_a_claim_ends_with_its_process(tmp_path: Path, word: str) -> None:
    end(holder(tmp_path), word)
    assert (tmp_path / ".claim.00000001" / "released").exists()
    claim = Claim.take(tmp_path)
    assert claim.is_held() and claims(tmp_path) == [".claim.00000002"]
    claim.release()


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    victim = holder(tmp_path)
    victim.send_signal(signal.SIGKILL)
    # Not waited for yet, it is still in the table of processes.
    os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
    claim = Claim.take(tmp_path)
    claim.check()
    claim.release()
    victim.communicate()


def test_a_number_that_another_process_got_meanwhile_is_no_sign_of_life(tmp_path: Path) -> None:
    owner(tmp_path, pid=os.getppid(), started="ticks 1", machine=machine_digest())
    Claim.take(tmp_path).release()


def test_a_process_that_may_not_be_looked_at_counts_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object, **__: object) -> str:
        raise FileNotFoundError

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    owner(tmp_path, pid=os.getppid(), started="ticks 1", machine=machine_digest())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", hidden)
        patch.setattr(os, "kill", refused)
        assert process_start(os.getppid()) == "unknown"
    with monkeypatch.context() as patch:
        patch.setattr(lease, "process_start", lambda pid: "unknown")
        with pytest.raises(ClaimHeld):
            Claim.take(tmp_path)
    assert process_start(0) is None and process_start(2**22 + 1) is None


def test_a_live_process_of_this_machine_keeps_its_claim(tmp_path: Path) -> None:
    owner(tmp_path, pid=os.getppid(), started=process_start(os.getppid()), machine=machine_digest(), age_s=50)
    with pytest.raises(ClaimHeld, match="last sign of life 50 s ago"):
        Claim.take(tmp_path)


def test_another_machine_is_waited_for_until_it_has_been_silent_long_enough(tmp_path: Path) -> None:
    path = owner(tmp_path, pid=os.getpid(), started=process_start(os.getpid()), age_s=20.0)
    with pytest.raises(ClaimHeld) as caught:
        Claim.take(tmp_path)
    assert caught.value.pid is None and "run the same command again in 40 s" in caught.value.advice
    then = path.joinpath("owner.json").stat().st_mtime - 41
    os.utime(path / "owner.json", (then, then))
    Claim.take(tmp_path).release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": 1}', "\x00" * 80])
def test_a_claim_that_nobody_can_read_lasts_until_it_is_old(tmp_path: Path, content: str) -> None:
    path = owner(tmp_path) / "owner.json"
    path.write_text(content)
    with pytest.raises(ClaimHeld):
        Claim.take(tmp_path)
    os.utime(path, (0, 0))
    Claim.take(tmp_path).release()


def test_the_clock_of_this_machine_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner(tmp_path, age_s=10.0)
    for wrong in (0.0, 4e9):
        monkeypatch.setattr("time.time", lambda wrong=wrong: wrong)
        with pytest.raises(ClaimHeld, match="10 s ago"):
            Claim.take(tmp_path)


def interfere(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Let somebody else act between the look at a stale claim and the move that takes it over."""
    judged = lease._require_free

    def slow(*arguments: Any) -> None:
        judged(*arguments)
        monkeypatch.setattr(lease, "_require_free", judged)
        action()

    monkeypatch.setattr(lease, "_require_free", slow)


def test_the_slower_of_two_that_saw_it_stale_does_not_touch_the_claim_of_the_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner(tmp_path, age_s=100.0)
    faster: list[subprocess.Popen[str]] = []
    interfere(monkeypatch, lambda: faster.append(holder(tmp_path)))
    with pytest.raises(ClaimHeld) as caught:
        Claim.take(tmp_path)
    assert caught.value.pid == faster[0].pid
    assert claims(tmp_path) == [".claim.00000002"]
    end(faster[0])


def test_the_slowest_that_finds_its_number_free_again_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner(tmp_path, age_s=100.0)
    others: list[subprocess.Popen[str]] = []

    def two_others() -> None:
        # The first comes and goes as number 2; the second, number 3, removes what is left of it.
        end(holder(tmp_path))
        others.append(holder(tmp_path))

    interfere(monkeypatch, two_others)
    with pytest.raises(ClaimHeld) as caught:
        Claim.take(tmp_path)
    assert caught.value.pid == others[0].pid
    assert claims(tmp_path) == [".claim.00000003"]
    end(others[0])


def test_a_claim_that_was_lost_is_noticed(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path)
    owner(tmp_path, number=claim.number + 1)
    with pytest.raises(StoreError, match=r"took .* over while this one was suspended; nothing more was written"):
        claim.check()
    claim.release()
    assert (tmp_path / ".claim.00000002" / "owner.json").exists()


def test_a_claim_that_somebody_removed_is_lost(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path)
    (tmp_path / ".claim.00000001" / "owner.json").unlink()
    assert not claim.is_held()
    claim.release()


def test_the_claims_of_one_process_are_one(tmp_path: Path) -> None:
    first, second = Claim.take(tmp_path), Claim.take(tmp_path / "." / "")
    assert first is second
    first.release()
    assert second.is_held()
    second.release()
    assert not second.is_held()


def test_a_claim_that_nobody_refers_to_is_released(tmp_path: Path) -> None:
    cell = ResultStore(tmp_path).open_cell({"suite": "s", "method": "m"}, {})
    cell.begin_attempt({})
    path = cell.path
    del cell
    gc.collect()
    (number,) = claims(path)
    assert (path / number / "released").exists()


def test_a_held_claim_gives_signs_of_life(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path, period_s=0.05)
    path = tmp_path / ".claim.00000001" / "owner.json"
    os.utime(path, (0, 0))
    late = time.monotonic() + 60
    while path.stat().st_mtime == 0 and time.monotonic() < late:
        pass
    assert path.stat().st_mtime > 0
    claim.release()


def test_a_fork_neither_writes_nor_releases(tmp_path: Path) -> None:
    script = """
        import os, sys
        from pathlib import Path
        from flashmem_bench.errors import StoreError
        from flashmem_bench.store import ResultStore

        cell = ResultStore(Path(sys.argv[1])).open_cell({"suite": "s", "method": "m"}, {})
        cell.begin_attempt({})
        cell.append({"sample_id": "a"}, {})
        if os.fork() == 0:
            try:
                cell.append({"sample_id": "b"}, {})
            except StoreError as error:
                print(error, flush=True)
            try:
                ResultStore(Path(sys.argv[1])).cells()[0].begin_attempt({})
            except StoreError as error:
                print(error, flush=True)
            cell.close()
            sys.exit(0)
        os.wait()
        cell.append({"sample_id": "c"}, {})
        print(sorted(cell.done()))
    """
    out, errors = start(script, tmp_path).communicate()
    assert not errors
    first, second, last = out.splitlines()
    assert "is a fork of the one that writes" in first
    assert "another process is writing s x m" in second
    assert last == "['a', 'c']"


SLEEPER = """
    import sys
    from pathlib import Path
    from flashmem_bench.cell_store import CellStore
    from flashmem_bench.errors import StoreError

    cell = CellStore(Path(sys.argv[1]), "c", period_s=0.05, expiry_s=0.4)
    cell.describe({"suite": "s", "method": "m"}, {"suite": "s", "method": "m"})
    cell.begin_attempt({})
    cell.append({"sample_id": "first"}, {"text": "of the sleeper"})
    print("written", flush=True)
    sys.stdin.readline()
    late = {"sample_id": "second"}
    for action in (lambda: cell.append(late, {}), lambda: cell.finish({}), lambda: cell.begin_attempt({})):
        try:
            action()
            print("wrote")
        except StoreError as error:
            print(error)
    cell.close()
"""


def test_a_process_that_slept_through_a_take_over_writes_nothing(tmp_path: Path, tally: Callable[..., None]) -> None:
    sleeper = start(SLEEPER, tmp_path)
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "written\n"
    sleeper.send_signal(signal.SIGSTOP)
    cell = CellStore(tmp_path, "c")
    while True:
        try:
            assert cell.begin_attempt({}) == 2
            break
        except StoreError as error:
            assert f"process {sleeper.pid} of this machine" in str(error)
    cell.append({"sample_id": "third"}, {"text": "of the heir"})
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    sleeper.send_signal(signal.SIGCONT)
    out, errors = sleeper.communicate("go on\n")
    assert not errors
    assert [line.count("another process") for line in out.splitlines()] == [1, 1, 1], out
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    cell.append({"sample_id": "fourth"}, {})
    tally("a writer sleeps through a take-over", 1, lost=len({"first", "third", "fourth"} - cell.done()))
    cell.close()


def test_the_same_command_twice_at_once_is_refused_in_one_sentence(tmp_path: Path) -> None:
    identity = {"suite": "s", "method": "m"}
    sleeper = start(SLEEPER, ResultStore(tmp_path).open_cell(identity, {"suite": "s", "method": "m"}).path)
    assert sleeper.stdout is not None and sleeper.stdout.readline() == "written\n"
    with pytest.raises(StoreError, match="another process is writing s x m in ") as caught:
        ResultStore(tmp_path).open_cell(identity, {"limit": 3})
    assert "--results-dir" in str(caught.value) and caught.value.exit_code == 1
    assert len(ResultStore(tmp_path).cells()[0].rows()) == 1, "reading needs no claim"
    sleeper.kill()
    sleeper.communicate()


def test_a_claim_holds_no_name_of_a_host_or_user(tmp_path: Path) -> None:
    claim = Claim.take(tmp_path)
    told = json.loads((tmp_path / ".claim.00000001" / "owner.json").read_text())
    assert set(told) == {"token", "pid", "started", "machine", "expiry_s"}
    assert len(told["machine"]) == 16 and told["started"].startswith(("ticks", "time"))
    claim.release()
