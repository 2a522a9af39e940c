"""`tppo data inspect`: what it counts, what it shows, how it fails."""

import json
import os
import sys
from pathlib import Path

import pytest

from tppo.cli import main
from tppo.sessions.inspect import LONGEST, inspect_log, report
from tppo.sessions.readers import ReadConfig
from tppo.sessions.session import DataError, Event, Session, write_sessions


def search(text: str) -> Event:
    return Event("search", text)


ROWS = [
    # literally in the history, and its newest query
    Session("1", "ann", "made", ("likes tea",), (search("red shoes"), search("tea")), ("Tea",)),
    # but for punctuation in the history, and within the prompt as a part of it; one new
    Session("2", "ann", "made", (), (search("red shoes!"), search("hat")), ("red shoes", "hats")),
    # in the profile only
    Session("3", "bob", "made", ("I want a blue hat.",), (search("cap"),), ("blue hat",)),
    # the first one again, of somebody else, with other punctuation
    Session("4", "bob", "made", ("x",), (search("Red shoes"), search("tea?")), ("tea",)),
    # the third one again
    Session("5", "bob", "made", ("I want a blue hat.",), (search("cap"),), ("blue hat",)),
    Session("6", "eve", "made", (), (Event("click", "http://a", "2025"),), ("one two three",)),
]


@pytest.fixture
def log(tmp_path) -> Path:
    write_sessions(tmp_path / "log.jsonl", ROWS)
    return tmp_path / "log.jsonl"


def test_counts(log):
    figures = inspect_log(log, ReadConfig())
    expected = {
        "format": "sessions",
        "sessions": 6,
        "users": 3,
        "events": {"search": 8, "click": 1},
        "with_profile": 4,
        "with_times": 1,
        "targets": 7,
        "exact_duplicates": 1,
        "near_duplicates": 2,
        "near_duplicates_of_another_user": 1,
        "targets_in_history": 1,
        "targets_in_history_normalized": 3,
        "targets_within_prompt": 5,
        "targets_equal_last_query": 2,
        "sessions_with_target_in_history": 1,
        "left_out": {},
    }
    assert {name: figures[name] for name in expected} == expected
    assert figures["lengths"]["words_per_target"] == {
        "mean": 12 / 7, "median": 2, "p99": 3, "max": 3,
    }  # fmt: skip
    assert figures["lengths"]["history_events"] == {"mean": 1.5, "median": 1, "p99": 2, "max": 2}


def test_the_script_is_named_and_words_without_spaces_are_counted(tmp_path):
    rows = [Session("1", "a", "made", (), (search("東京ホテル cafe"),), ("東京ホテル",))]
    write_sessions(tmp_path / "log.jsonl", rows)
    figures = inspect_log(tmp_path / "log.jsonl", ReadConfig())
    assert figures["scripts"] == {"Katakana": 6, "Han": 4, "Latin": 4}
    assert figures["lengths"]["words_per_query"]["mean"] == 3
    assert figures["lengths"]["words_per_target"]["mean"] == 2
    text = report(figures)
    assert "Katakana 42.9%, Han 28.6%, Latin 28.6%; no spaces are written in Katakana, Han" in text


def test_without_icu_a_script_without_spaces_names_what_to_install(tmp_path, monkeypatch):
    rows = [Session("1", "a", "made", (), (), ("東京ホテル",))]
    write_sessions(tmp_path / "log.jsonl", rows)
    monkeypatch.setitem(sys.modules, "icu4py.breakers", None)
    with pytest.raises(SystemExit, match=r"icu4py is not installed.*tppo-kernels\[train\]"):
        main(["data", "inspect", str(tmp_path / "log.jsonl")])


def test_a_log_in_latin_letters_says_so(log):
    text = report(inspect_log(log, ReadConfig()))
    assert "scripts                 Latin 100.0%\n" in text


def test_a_target_is_looked_for_as_whole_words(tmp_path):
    rows = [Session("1", "a", "made", (), (search("chats online"),), ("hats",))]
    write_sessions(tmp_path / "log.jsonl", rows)
    assert inspect_log(tmp_path / "log.jsonl", ReadConfig())["targets_within_prompt"] == 0


def test_lengths_are_counted_up_to_a_bound(tmp_path):
    rows = [Session("1", "a", "made", (), (search("x " * (LONGEST + 9)),), ("y",))]
    write_sessions(tmp_path / "log.jsonl", rows)
    figures = inspect_log(tmp_path / "log.jsonl", ReadConfig())
    assert figures["lengths"]["words_per_query"]["max"] == LONGEST


def test_examples_are_drawn_by_the_seed(log):
    drawn = [
        [session.id for session in inspect_log(log, ReadConfig(), 3, seed)["examples"]]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) > 1
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert len(inspect_log(log, ReadConfig(), 50)["examples"]) == 6
    assert inspect_log(log, ReadConfig(), 0)["examples"] == []


def test_command_prints_a_report_or_json(log, capsys):
    main(["data", "inspect", str(log), "--examples", "6"])
    text = capsys.readouterr().out
    assert ["sessions", "6"] in [line.split() for line in text.splitlines()]
    assert "session 3 of user bob" in text
    assert "-> blue hat" in text
    assert "2 of 7 (28.6%) right" in text
    main(["data", "inspect", str(log), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["sessions"] == 6
    assert figures["examples"][0]["targets"]


def test_command_takes_a_format_and_names_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "log.tsv"
    path.write_text("7\tone\t2006-03-01 07:00:00\n7\ttwo\tnoon\n")
    with pytest.raises(SystemExit, match="1 rows are wrong"):
        main(["data", "inspect", str(path)])
    assert "log.tsv: line 2: column 3 'QueryTime': was 'noon'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2 rows are wrong"):
        main(["data", "inspect", str(path), "--format", "chat"])
    assert "log.tsv: line 1: not JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="absent: cannot be read"):
        main(["data", "inspect", str(tmp_path / "absent")])


def test_left_out_is_reported(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("7\tone\t2006-03-01 07:00:00\n")
    figures = inspect_log(path, ReadConfig())
    assert figures["left_out"] == {"session with fewer than 4 different searches": 1}
    assert "1: session with fewer than 4 different searches" in report(figures)


def test_data_stage_takes_every_format(tmp_path, capfd):
    path = tmp_path / "log.csv"
    rows = [
        f"{n},u,{session},query {n} {session % 6},2025-01-10 00:0{n}:00,[],x,[]\n"
        for session in range(9)
        for n in (1, 2, 3)
    ]
    path.write_text("".join(rows))
    main(["data", "--data", str(path), "--out", str(tmp_path / "run"), "--duplicates", "near"])
    assert "left out 3: near duplicate" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "rows", "users", "leaks"),
    [("sim4ia_sessions", 45, 45, 11), ("ikat_turns", 390, 21, 70)],
)
def test_real_sessions(name, rows, users, leaks):
    folder = os.environ.get("TPPO_SESSIONS")
    if not folder:
        pytest.skip("TPPO_SESSIONS names no folder with real sessions")
    figures = inspect_log(Path(folder) / f"{name}.jsonl", ReadConfig())
    assert (figures["sessions"], figures["users"]) == (rows, users)
    assert figures["targets_in_history"] == leaks


def test_an_empty_log_is_named(tmp_path):
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match=r"e\.jsonl: empty"):
        inspect_log(tmp_path / "e.jsonl", ReadConfig())
