"""From a log to its splits: duplicates, users kept whole, memory that does not grow."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tppo.sessions.config import SessionsConfig
from tppo.sessions.duplicates import near_key, normalize, without_duplicates
from tppo.sessions.session import (
    DataError,
    Event,
    Session,
    read_sessions,
    session_of,
    write_sessions,
)
from tppo.sessions.split import split_log, splitter
from tppo.store.fingerprints import Fingerprints
from tppo.store.line_index import LineIndex


def session(id: str, user: str, *queries: str, time: str | None = None) -> Session:
    history = tuple(Event("search", query, time) for query in queries[:-1])
    return Session(id, user, "made", (), history, queries[-1:])


def test_duplicates():
    first = session("1", "a", "Red shoes!", "boots")
    same = session("2", "a", "Red shoes!", "boots")
    near = session("3", "b", "red  SHOES", "boots.", time="2025")
    other = session("4", "a", "red", "shoes boots")
    every = [first, same, near, other]
    for mode, kept in {"keep": "1234", "exact": "134", "near": "14"}.items():
        left_out: Counter[str] = Counter()
        assert "".join(s.id for s in without_duplicates(every, mode, left_out)) == kept
        assert sum(left_out.values()) == 4 - len(kept)
    assert normalize("Ｃafé—“X”  y!") == "café x y"
    assert normalize("?!") != normalize("...")
    assert near_key(first) != near_key(other)


def test_split_is_by_user_and_the_same_in_every_process(tmp_path):
    rows = [session(str(i), f"u{i % 90}", "a", f"b{i}") for i in range(400)]
    write_sessions(tmp_path / "log.jsonl", rows)
    program = (
        "import sys; from pathlib import Path; from tppo.sessions.config import SessionsConfig;"
        "from tppo.sessions.split import split_log; out = Path(sys.argv[1]);"
        "split_log(out.parent / 'log.jsonl', SessionsConfig(), 3, out)"
    )
    for name, seed in {"one": "1", "two": "2"}.items():
        (tmp_path / name).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / name], env=environment, check=True
        )
    files = {name: (tmp_path / "one" / f"{name}.jsonl") for name in ("train", "heldout", "test")}
    for file in files.values():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    users = {name: {s.user for s in read_sessions(file)} for name, file in files.items()}
    assert {name: len(found) for name, found in users.items()} == {
        "train": 63,
        "heldout": 9,
        "test": 18,
    }
    assert len(set.union(*users.values())) == 90
    assert sum(len(read_sessions(file)) for file in files.values()) == 400
    other = splitter(SessionsConfig(), 4, set.union(*users.values()))
    assert {user for user in set.union(*users.values()) if other(user) == "test"} != users["test"]


def test_a_large_log_splits_by_threshold_alone():
    split_of = splitter(SessionsConfig(), 0, None)
    counts = Counter(split_of(f"u{i}") for i in range(20_000))
    assert abs(counts["test"] / 20_000 - 0.2) < 0.015
    assert abs(counts["heldout"] / 20_000 - 0.1) < 0.015


@pytest.mark.parametrize(
    ("users", "shares", "message"),
    [
        (2, {}, "2 users, expected at least 3"),
        (3, {"test_share": 0.6}, "no user of 3 is left to train on; lower the shares"),
    ],
)
def test_too_few_users_are_named(tmp_path, users, shares, message):
    write_sessions(tmp_path / "log.jsonl", [session(str(i), f"u{i}", "a") for i in range(users)])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=message):
        split_log(tmp_path / "log.jsonl", SessionsConfig(**shares), 0, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_fingerprints_count_what_a_dictionary_counts():
    table, truth = Fingerprints(), {}
    for i in range(20_000):
        text = str(i * i % 7_919)
        assert table.setdefault(text, i) == truth.setdefault(text, i)
    assert len(table) == len(truth)
    assert all(table.get(text) == value for text, value in truth.items())
    assert "new" not in table and table.add("new") and not table.add("new")


def test_line_index_finds_lines_and_checks_all(tmp_path):
    rows = [session(f"s{i}", "u", "é" * i, "a") for i in range(1, 50)]
    write_sessions(tmp_path / "s.jsonl", rows)
    with LineIndex(tmp_path / "s.jsonl", session_of) as index:
        assert len(index) == 49
        assert [index.get(row.id) for row in reversed(rows)] == rows[::-1]
        assert index.get("absent") is None
    write_sessions(tmp_path / "s.jsonl", [*rows, rows[3]])
    with pytest.raises(DataError, match=r"s\.jsonl: line 50: field 'id'.*\(line 4 has it too\)"):
        LineIndex(tmp_path / "s.jsonl", session_of)


MEMORY = """
import re, sys
from pathlib import Path
from tppo.sessions.config import SessionsConfig
from tppo.sessions.split import split_log
out = Path(sys.argv[1])
split_log(out.parent / sys.argv[2], SessionsConfig(), 0, out)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_log(tmp_path):
    # VmHWM and not getrusage: after exec ru_maxrss still holds the peak of the process that forked.
    filler = " ".join(f"word{i}" for i in range(60))
    peak = {}
    for n in (12_000, 36_000):
        rows = (session(f"s{i}", f"u{i}", f"{filler} {i}", f"{filler} b{i}") for i in range(n))
        write_sessions(tmp_path / f"{n}.jsonl", rows)
        (tmp_path / "out").mkdir(exist_ok=True)
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "out"), f"{n}.jsonl"]
        peak[n] = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    # As a list the 24,000 further sessions would take more than 24 MB in their texts alone.
    assert peak[36_000] - peak[12_000] < 6_000  # KiB
