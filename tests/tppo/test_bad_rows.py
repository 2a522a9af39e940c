"""Rows that are wrong, in every format: the first stops, or each is left out, counted and named."""

import gzip
import json
import os
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_readers import AOL, CHAT, IKAT, QAC_TRAIN, SIM4IA, parquet, read, text

from tppo.cli import main
from tppo.sessions.readers import ReadConfig, SessionLog, detect_format
from tppo.sessions.session import DataError, Event, Session, session_line

SESSION = session_line(Session("s", "u", "made", (), (Event("search", "a"),), ("b",)))


def session(id: str) -> str:
    return SESSION.replace('"s"', f'"{id}"')


def chat(**values) -> str:
    return json.dumps(CHAT | values) + "\n"


def row(n: int, query: str, day: int = 1, user: str = "7") -> str:
    return f"{user}\t{query}\t2006-03-0{day} 07:0{n}:00\n"


GOOD_AOL = "".join(row(n, f"q{n}") for n in range(4))
TOPICS = [json.dumps(topic) for topic in IKAT]
# format: (name of the file, content, wrong rows and how each is named, ids of what is kept)
WRONG = {
    "sessions": (
        "s.jsonl",
        session("1") + "{\n" + session("1") + '{"id": 1}\n' + session("2"),
        ["line 2: not JSON", "line 3: field 'id': was '1'", "line 4: field 'history': missing"],
        ["1", "2"],
    ),
    "sessions in a list": (
        "s.json",
        f"[{session('1')}, 3,\n{session('1')},{session('2')}]",
        ["line 2: column 3: was '3,', expected an object", "line 3: field 'id'"],
        ["1", "2"],
    ),
    "chat": (
        "c.jsonl",
        chat() + "[]\n" + chat(messages=3) + chat(id=[]) + chat(id="last"),
        [r"line 2: was \[\]", "line 3: field 'messages'", "line 4: field 'id'"],
        ["chat-1", "last"],
    ),
    "aol": (
        "a.tsv",
        GOOD_AOL.replace("q2\n", "q2\n7\tx\n") + "8\tx\tnoon\n" + row(1, "x", user="9")
        + row(5, "again") + "9\t\udcff\t2006-03-01 07:00:00\n",
        ["line 5: column 3 'QueryTime'", "line 8: not UTF-8", "line 7: column 'AnonID': was '7'"],
        ["aol-7-1"],
    ),
    "sim4ia": (
        "a.csv",
        SIM4IA.replace("1,test_user,5", "1,2\n1,test_user,5") + '2,"x"y,6\n'
        + "1,u,5,x,2025-01-10 20:59:49,[],ae,[]\n2,u,5,y,noon,[],ae,[]\n"
        + "1,u,6,x,2025-01-10 20:59:49,[],ae,[]\n1,u,4,y,2025-01-10 20:59:49,[],ae,[]\n",
        ["line 4: 2 columns", "line 6: not CSV", "line 8: column 'date'", "line 10: .*'4' again"],
        ["sim4ia-4", "sim4ia-5"],
    ),
    "ikat": (
        "t.json",
        "[" + ",\n".join([TOPICS[0], "7", TOPICS[0], TOPICS[1].replace('"Red?"', "8"), TOPICS[1]])
        + "]",
        [r"line 2: column 1: was '7,'", "line 3: field 'id': was '9-1'",
         r"line 4: field 'responses\[1\].user_utterance': was 8"],
        ["ikat-9-1-2", "ikat-9-1-3", "ikat-10-2"],
    ),
}  # fmt: skip


@pytest.fixture(params=WRONG)
def case(request, tmp_path):
    name, content, wrong, kept = WRONG[request.param]
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    return path, wrong, kept


def test_the_first_wrong_row_stops_and_the_remedy_is_named(case):
    path, wrong, _ = case
    with pytest.raises(DataError, match=rf"{path.name}: {wrong[0]}.*; --on-bad-row skip leaves"):
        read(path)


def test_wrong_rows_are_left_out_counted_and_named(case):
    path, wrong, kept = case
    log = SessionLog(path, ReadConfig(on_bad_row="skip"))
    for _ in range(2):  # a second reading counts anew
        assert [session.id for session in log] == kept
        assert log.bad.count == len(wrong)
    for message, expected in zip(log.bad.first, wrong, strict=True):
        assert re.search(expected, message), message


def test_wrong_parquet_rows_are_left_out(tmp_path):
    rows = [*QAC_TRAIN, QAC_TRAIN[0], {**QAC_TRAIN[1], "query_id": 9, "final_search_term": None},
            {**QAC_TRAIN[1], "query_id": 10, "session_id": None}]  # fmt: skip
    log = SessionLog(parquet(tmp_path / "q.parquet", rows), ReadConfig(on_bad_row="skip"))
    assert [session.id for session in log] == ["qac-1", "qac-2"]
    assert log.bad.count == 3 and "row 4: column 'query_id'" in "".join(log.bad.first)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(WRONG)), st.data())
def test_no_damage_to_a_row_stops_a_reading_that_skips(tmp_path_factory, kind, data):
    """But for damage to a JSON list itself, which has no rows then."""
    name, content, _, _ = WRONG[kind]
    raw = bytearray(content, "utf-8", "surrogateescape")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(raw)
    format = "sessions" if "list" in kind else kind
    try:
        list(SessionLog(path, ReadConfig(format=format, on_bad_row="skip")))
    except DataError as error:
        assert path.suffix == ".json" or "gzip" in str(error), error


def test_aol_as_pandas_writes_it_again(tmp_path):
    original = read(text(tmp_path / "a.tsv", AOL))
    head, *lines = AOL.splitlines()
    saved = [
        "\t".join([*fields[:3], f"{fields[3]}.0" if fields[3] else "nan", fields[4] or "nan"])
        for fields in ((line.split("\t") + ["", ""])[:5] for line in lines)
    ]
    assert read(text(tmp_path / "b.tsv", "\n".join([head, *saved]))) == original
    other = "\n".join([head, *saved]).replace("nan", "<NA>").replace(".0\t", ".\t")
    assert read(text(tmp_path / "c.tsv", other)) == original
    with pytest.raises(DataError, match="column 4 'ItemRank': was '1.5', expected a whole number"):
        read(text(tmp_path / "d.tsv", "\n".join([head, *saved]).replace("1.0", "1.5")))
    indexed = "\n".join(f"{i}\t{line}" for i, line in enumerate([head, *saved]))
    with pytest.raises(DataError, match=r"6 columns, expected 5 .*index of pandas\? to_csv\("):
        read(text(tmp_path / "e.tsv", indexed))


SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "human", "value": "tea"},
        {"from": "gpt", "value": "which?"},
        {"from": "human", "value": "green tea"},
    ],
}


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt", "json.gz"])
def test_sharegpt_in_a_list_or_a_line_each(tmp_path, suffix, indent):
    rows = [SHAREGPT, SHAREGPT | {"id": "y"}]
    content = json.dumps(rows, indent=indent)
    if suffix == "jsonl":
        content = "\n".join(map(json.dumps, rows))
    path = tmp_path / f"share.{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert detect_format(path) == "chat"
    sessions, _ = read(path)
    assert [(s.id, s.history, s.targets) for s in sessions] == [
        (id, (Event("utterance", "tea"),), ("green tea",)) for id in "xy"
    ]


def test_other_names_of_the_user_and_lists_of_each_kind(tmp_path):
    said = [{"role": "human", "content": "a"}, {"role": "human", "content": "b"}]
    ((session,), _) = read(text(tmp_path / "a.json", json.dumps([{"conversations": said}])))
    assert session.targets == ("b",)
    wrong = json.dumps([{"conversations": [{"from": "human", "text": "a"}]}])
    with pytest.raises(DataError, match=r"line 1: field 'conversations\[0\].value': missing"):
        read(text(tmp_path / "b.json", wrong))
    ((session,), _) = read(text(tmp_path / "c.json", f"[\n{SESSION}]"))
    assert session.id == "s"


def test_inspect_names_every_wrong_row(tmp_path, capsys):
    lines = [GOOD_AOL, *(f"7\tx\t{n} o'clock\n" for n in range(9))]
    path = text(tmp_path / "a.tsv", "".join(lines))
    with pytest.raises(SystemExit, match="9 rows are wrong, each is named above; `tppo data` s"):
        main(["data", "inspect", str(path)])
    out, err = capsys.readouterr()
    assert [f"line {n}: column 3 'QueryTime'" in err for n in range(1, 15)] == [
        5 <= n <= 13 for n in range(1, 15)
    ]
    assert ["wrong", "rows", "9"] in [line.split() for line in out.splitlines()]
    main(["data", "inspect", str(path), "--on-bad-row", "skip", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["bad_rows"]["count"] == 9 and len(figures["bad_rows"]["first"]) == 5


def test_the_data_stage_names_the_first_five(tmp_path, capsys):
    rows = "".join(session(str(n)).replace('"u"', f'"u{n}"').replace('"b"', f'"b{n}"')
                   for n in range(30))  # fmt: skip
    path = text(tmp_path / "s.jsonl", rows + "{\n" * 7)
    with pytest.raises(SystemExit, match="line 31: not JSON.*--on-bad-row skip leaves such rows"):
        main(["data", "--data", str(path), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    flags = ["--on-bad-row", "skip", "--out", str(tmp_path / "out")]
    main(["data", "--data", str(path), *flags])
    said = capsys.readouterr().err
    assert "left out 7: wrong (--on-bad-row skip), the first of them:" in said
    assert said.count("not JSON") == 5 and "line 35" in said and "line 36" not in said
    with pytest.raises(SystemExit, match="no session of the log was kept"):
        main(["data", "--data", str(text(tmp_path / "t.jsonl", "{\n")), *flags])


def test_a_log_of_which_nothing_is_kept_is_a_warning_in_red_and_no_page_of_zeros(tmp_path):
    path = text(tmp_path / "a.tsv", row(1, "alone"))
    main_end, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tppo", "data", "inspect", str(path)],
        stderr=terminal, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"},
    )  # fmt: skip
    out, _ = process.communicate(timeout=600)
    os.close(terminal)
    shown = os.read(main_end, 1 << 16).decode()
    os.close(main_end)
    assert process.returncode == 0
    assert "\x1b[1;31mWARNING: 0 sessions were kept" in shown
    assert "1: session with fewer than 4 different searches" in out and "targets in" not in out


def test_a_pipe_is_refused_before_anything_is_read(tmp_path):
    for command in (["data", "inspect"], ["data", "--out", str(tmp_path / "out"), "--data"]):
        pipe = tmp_path / f"pipe{len(command)}"
        os.mkfifo(pipe)
        writer = threading.Thread(target=lambda pipe=pipe: open(pipe, "wb"), daemon=True)
        writer.start()
        with pytest.raises(SystemExit, match="pipe.: a pipe or a device, .* give a file"):
            main([*command, str(pipe)])
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match=f"{tmp_path}: a folder, expected a file"):
        main(["data", "--out", str(tmp_path / "out"), "--data", str(tmp_path)])
    shell = f"{sys.executable} -m tppo data inspect <(echo x)"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 1 and "give a file" in done.stderr
