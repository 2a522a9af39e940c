"""Session files: what is read, and how every way of being wrong is named."""

import json
import os
from pathlib import Path

import pytest

from tppo.sessions.session import DataError, Event, Session, read_sessions, write_sessions
from tppo.store.jsonl import plain, read_jsonl, write_json, write_jsonl

GOOD = {
    "id": "s1",
    "user": "u1",
    "source": "made",
    "profile": ["likes running"],
    "history": [{"type": "search", "text": "red shoes", "time": "2025-01-10", "clicks": 2}],
    "targets": ["red running shoes"],
}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def changed(**fields: object) -> dict[str, object]:
    return {**GOOD, "id": "s2", **fields}


def without(field: str) -> dict[str, object]:
    return {key: value for key, value in changed().items() if key != field}


def event(**fields: object) -> dict[str, object]:
    return changed(history=[GOOD["history"][0], {"type": "search", "text": "boots", **fields}])


def test_reads_every_field(tmp_path):
    assert read_sessions(write(tmp_path / "s.jsonl", GOOD)) == [
        Session(
            id="s1",
            user="u1",
            source="made",
            profile=("likes running",),
            history=(Event("search", "red shoes", "2025-01-10", 2),),
            targets=("red running shoes",),
        )
    ]


def test_optional_fields_may_be_absent_or_null_and_others_are_ignored(tmp_path):
    row = without("profile") | {"extra": {"a": [1]}}
    row["history"] = [{"type": "click", "text": "x", "time": None, "other": 1}]
    (session,) = read_sessions(write(tmp_path / "s.jsonl", row))
    assert session.profile == ()
    assert session.history == (Event("click", "x", None, None),)
    assert read_sessions(write(tmp_path / "n.jsonl", changed(profile=None)))[0].profile == ()


def test_white_space_in_texts_becomes_single_spaces(tmp_path):
    row = changed(targets=["  red\nshoes\t\u00a0 now\u2028!"], profile=[" a \r\n b "])
    (session,) = read_sessions(write(tmp_path / "s.jsonl", row))
    assert session.targets == ("red shoes now !",)
    assert session.profile == ("a b",)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [b"", b"\n \n\n"])
def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path, start, end, last):
    path = tmp_path / "s.jsonl"
    rows = [json.dumps(GOOD).encode(), json.dumps(changed()).encode()]
    path.write_bytes(start + end.join(rows) + last)
    assert [session.id for session in read_sessions(path)] == ["s1", "s2"]


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    path = tmp_path / "s.jsonl"
    text = json.dumps(changed(targets=["a\u2028b\u0085c"]), ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert read_sessions(path)[0].targets == ("a b c",)


BAD_LINES = {
    "not json": ('{"id": ', "not JSON"),
    "not json, cut": (json.dumps(GOOD)[:-5], "not JSON"),
    "a list": ("[1, 2]", r"was \[1, 2\], expected a JSON object"),
    "a number": ("12", "was 12, expected a JSON object"),
    "too deep": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "not JSON: nested too deeply"),
    "a huge number": ('{"id": ' + "9" * 5_000 + "}", "not JSON that can be held"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_object_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.jsonl: line 3: .*{message}"):
        read_sessions(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: line 2: not UTF-8: byte 0xe9 at byte 12"):
        read_sessions(path)


BAD_FIELDS = {
    "no id": (without("id"), "field 'id': missing, expected a text"),
    "id is a number": (changed(id=7), "field 'id': was 7, expected a text"),
    "blank id": (changed(id=" "), "field 'id': was ' '"),
    "id twice": (changed(id="s1"), r"field 'id': was 's1'.*used once \(line 1 has it too\)"),
    "no user": (without("user"), "field 'user': missing"),
    "null user": (changed(user=None), "field 'user': was None"),
    "no source": (without("source"), "field 'source': missing"),
    "profile is a text": (changed(profile="x"), "field 'profile': was 'x', expected a list"),
    "profile of numbers": (changed(profile=["a", 3]), r"field 'profile\[1\]': was 3"),
    "no history": (without("history"), "field 'history': missing"),
    "history is a text": (changed(history="x"), "field 'history': was 'x', expected a list"),
    "event is a text": (changed(history=["x"]), r"field 'history\[0\]': was 'x', expected an obj"),
    "event without text": (
        changed(history=[{"type": "search"}]),
        r"field 'history\[0\].text': missing",
    ),
    "blank event": (event(text="\n"), r"field 'history\[1\].text': was '\\n'"),
    "event type": (event(type=1), r"field 'history\[1\].type': was 1"),
    "time is a number": (event(time=5), r"field 'history\[1\].time': was 5, expected a text"),
    "clicks is a text": (event(clicks="2"), r"field 'history\[1\].clicks': was '2'"),
    "clicks is negative": (event(clicks=-1), r"field 'history\[1\].clicks': was -1"),
    "clicks is true": (event(clicks=True), r"field 'history\[1\].clicks': was True"),
    "no targets": (without("targets"), "field 'targets': missing, .*at least one"),
    "empty targets": (changed(targets=[]), r"field 'targets': was \[\], .*at least one"),
    "null targets": (changed(targets=None), "field 'targets': was None, .*at least one"),
    "targets is a text": (changed(targets="x"), "field 'targets': was 'x', .*at least one"),
    "blank target": (changed(targets=["a", " \t"]), r"field 'targets\[1\]': was ' \\t'"),
    "target is null": (changed(targets=[None]), r"field 'targets\[0\]': was None"),
    "half a surrogate pair": (changed(targets=["\ud800"]), r"field 'targets\[0\]': was '\\ud800'"),
}


@pytest.mark.parametrize(("row", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_wrong_field_is_named(tmp_path, row, message):
    path = write(tmp_path / "bad.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"bad\.jsonl: line 2: {message}"):
        read_sessions(path)


@pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf\r\n"])
def test_an_empty_file_is_named(tmp_path, data):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"empty\.jsonl: empty, expected one JSON object a line"):
        read_sessions(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_sessions(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_sessions(tmp_path)


def test_written_sessions_read_back_equal(tmp_path):
    sessions = read_sessions(write(tmp_path / "a.jsonl", GOOD, without("profile")))
    write_sessions(tmp_path / "b.jsonl", sessions)
    assert read_sessions(tmp_path / "b.jsonl") == sessions
    assert "profile" not in json.loads((tmp_path / "b.jsonl").read_text().splitlines()[1])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl(path, rows())
    with pytest.raises(TypeError, match="was a object, expected something that JSON can hold"):
        write_json(path, object())
    assert [line.values for line in read_jsonl(path)] == [{"a": 1}]
    assert os.listdir(tmp_path) == ["x.jsonl"]


def test_json_holds_no_nan(tmp_path):
    assert plain({"a": float("nan"), "b": (1, float("inf")), "c": Path("x/y")}) == {
        "a": None,
        "b": [1, None],
        "c": "x/y",
    }


@pytest.mark.parametrize(("name", "rows"), [("sim4ia_sessions", 45), ("ikat_turns", 390)])
def test_real_sessions(tmp_path, name, rows):
    folder = os.environ.get("TPPO_SESSIONS")
    if not folder:
        pytest.skip("TPPO_SESSIONS names no folder with real sessions")
    sessions = read_sessions(Path(folder) / f"{name}.jsonl")
    assert len(sessions) == rows
    write_sessions(tmp_path / "copy.jsonl", sessions)
    assert read_sessions(tmp_path / "copy.jsonl") == sessions
