"""Readers of real logs: small files of each format, and every way of being wrong named by place."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from tppo.sessions.readers import ReadConfig, SessionLog, detect_format
from tppo.sessions.session import DataError, Event, Session

AOL = """AnonID	Query	QueryTime	ItemRank	ClickURL
7	red  shoes	2006-03-01 07:00:00	2	http://b.example
7	red shoes	2006-03-01 07:00:00	1	http://a.example
7	boots	2006-03-01 07:05:00		
7	-	2006-03-01 07:06:00
7	blue boots	2006-03-01 07:35:00	3	http://c.example
7	green boots	2006-03-01 07:40:00
7	tea	2006-03-01 09:08:00
9	x	2006-03-01 07:08:00
"""
SIM4IA = (
    '1,test_user,4,first  query,2025-01-10 20:55:48,"[1, 2]",ab,'
    "\"[('1', datetime.datetime(2025, 1, 10, 20, 56), 'works')]\"\n"
    "2,test_user,4,first query,2025-01-10 20:56:48,[],ac,"
    "\"[('1', datetime.datetime(2025, 1, 10, 20, 57), 'works'), "
    "('2', datetime.datetime(2025, 1, 10, 20, 58), 'author')]\"\n"
    '3,test_user,4,"a ""quoted"" one, twice",2025-01-10 20:59:48,[],ad,[]\n'
    "1,test_user,5,alone,2025-01-10 20:59:48,[],ae,[]\n"
)
IKAT = [
    {
        "number": "9-1",
        "ptkb": {"1": "I like tea.", "2": "I am tall."},
        "turns": [
            {"turn_id": 1, "utterance": "Hello?", "resolved_utterance": "Hello?"},
            {"turn_id": 2, "utterance": "And it?", "resolved_utterance": "And tea?"},
            {"turn_id": 3, "utterance": "Why?", "resolved_utterance": "Why tea?"},
        ],
    },
    {
        "number": 10,
        "ptkb": ["I run."],
        "responses": [
            {"turn_id": 1, "user_utterance": "Shoes?"},
            {"turn_id": 2, "user_utterance": "Red?", "resolved_utterance": "Red shoes?"},
            {"turn_id": 3, "user_utterance": "Thanks."},
        ],
    },
]
CHAT = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "tea"},
        {"role": "assistant", "content": "which?"},
        {"role": "user", "content": [{"type": "text", "text": "green\n tea"}, {"type": "image"}]},
    ]
}
QAC = [
    {
        "query_id": "23", "session_id": "783", "prefix": "transf",
        "past_search_terms": [["toys", "2023-10-07 13:03:54"], ["ultra magnus", None]],
        "final_search_term": "transformers", "search_time": "2023-10-11 16:42:34",
    }
]  # fmt: skip
QAC_TRAIN = [
    {"query_id": 1, "session_id": "7", "prefixes": ["s", "si"], "final_search_term": "sink",
     "search_time": "2023-09-04T20:46:27"},
    {"query_id": 2, "session_id": "7", "prefixes": ["p", "Pot"], "final_search_term": "pot",
     "search_time": "2023-09-04T20:47:27"},
    {"query_id": 3, "session_id": "8", "prefixes": ["cup"], "final_search_term": "cup",
     "search_time": "2023-09-04T20:48:27"},
]  # fmt: skip


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def read(path: Path, **options) -> tuple[list[Session], dict[str, int]]:
    log = SessionLog(path, ReadConfig(**options))
    sessions = list(log)
    return sessions, dict(log.left_out)


def test_aol_sessions_by_user_and_pause(tmp_path):
    sessions, left_out = read(text(tmp_path / "user-ct-01.txt", AOL))
    time = "2006-03-01 07:00:00"
    assert sessions == [
        Session(
            id="aol-7-1",
            user="aol-7",
            source="aol",
            profile=(),
            history=(
                Event("search", "red shoes", time, 2),
                Event("click", "http://b.example", time),
                Event("click", "http://a.example", time),
            ),
            targets=("boots", "blue boots", "green boots"),
        )
    ]
    assert left_out == {
        "row without a query": 1,
        "session with fewer than 4 different searches": 2,
    }


def test_aol_a_pause_of_exactly_the_gap_is_within_a_session(tmp_path):
    path = text(tmp_path / "a.tsv", AOL)
    assert len(read(path, gap_minutes=29.99)[0]) == 0
    assert len(read(path, gap_minutes=30.0)[0]) == 1
    (whole,), _ = read(path, gap_minutes=None)
    assert whole.targets == ("blue boots", "green boots", "tea")
    assert [event.text for event in whole.history if event.type == "search"] == [
        "red shoes",
        "boots",
    ]
    with pytest.raises(ValueError, match="'gap_minutes': was inf, expected a finite.*, or None"):
        read(path, gap_minutes=float("inf"))
    with pytest.raises(ValueError, match="'gap_minutes': was -1, expected at least 0, or None"):
        read(path, gap_minutes=-1)
    with pytest.raises(ValueError, match="field 'targets': was 0, expected at least 1"):
        read(path, targets=0)
    (one, *_), _ = read(path, targets=1)
    assert one.targets == ("green boots",)
    assert [e.text for e in one.history if e.type == "click"][-1] == "http://c.example"


def test_aol_clicks_on_a_target_are_not_in_the_history(tmp_path):
    sessions, _ = read(text(tmp_path / "a.tsv", AOL))
    assert "http://c.example" not in repr(sessions)


def test_aol_rows_of_a_user_are_put_in_time_order(tmp_path):
    head, *rows = AOL.splitlines()
    mixed = text(tmp_path / "m.tsv", "\n".join([head, *rows[:2], *reversed(rows[2:7]), rows[7]]))
    assert read(mixed)[0] == read(text(tmp_path / "a.tsv", AOL))[0]


def test_gzip_reads_like_the_file_and_a_damaged_one_is_named(tmp_path):
    path = text(tmp_path / "a.txt", AOL)
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed) == read(path)
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.txt\.gz: line \d+: gzip data is damaged"):
        read(packed, format="aol")


ROW = "7\tred shoes\t2006-03-01 07:00:00"
BAD_AOL = {
    "columns": ("7\tx", r"line 3: 2 columns, expected 5 separated by tabs \(AnonID"),
    "four columns": (ROW + "\t1", "line 3: 4 columns, expected 5"),
    "no user": (" \tx\t2006-03-01 07:00:00", "line 3: column 1 'AnonID': was ' ', expected a user"),
    "time": ("7\tx\tyesterday", r"line 3: column 3 'QueryTime': was 'yesterday', expected a time"),
    "rank": (ROW + "\tfirst\thttp://a", "line 3: column 4 'ItemRank': was 'first', expected a wh"),
    "user again": (
        "8\tx\t2006-03-01 07:00:00\n" + ROW,
        r"line 4: column 'AnonID': was '7' again after other users, expected the rows",
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD_AOL.values(), ids=BAD_AOL)
def test_a_wrong_aol_row_is_named(tmp_path, line, message):
    path = text(
        tmp_path / "bad.tsv", f"AnonID\tQuery\tQueryTime\tItemRank\tClickURL\n{ROW}\n{line}\n"
    )
    with pytest.raises(DataError, match=rf"bad\.tsv: {message}"):
        read(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_bytes(ROW.encode() + b"\n7\tcaf\xe9\t2006-03-01 07:00:00\n")
    with pytest.raises(DataError, match=r"bad\.tsv: line 2: not UTF-8: byte 0xe9 at byte 6"):
        read(path)


def test_sim4ia_without_header(tmp_path):
    sessions, left_out = read(text(tmp_path / "a.csv", SIM4IA))
    assert sessions == [
        Session(
            id="sim4ia-4",
            user="sim4ia-4",
            source="sim4ia",
            profile=(),
            history=(Event("search", "first query", "2025-01-10 20:55:48", 3),),
            targets=('a "quoted" one, twice',),
        )
    ]
    assert left_out == {"session with fewer than 2 different searches": 1}


def test_sim4ia_with_header(tmp_path):
    rows = (
        "session_id,query,date,serp,search_id,label\n"
        '3,one,2025-01-10 00:09:56,"[1, 2]",3a,A\n3,two,2025-01-10 00:13:25,[],a5,A\n'
    )
    ((session,), _) = read(text(tmp_path / "a.csv", rows))
    assert session.history == (Event("search", "one", "2025-01-10 00:09:56"),)
    assert session.targets == ("two",)


FIRST = SIM4IA.splitlines()[0] + "\n"
BAD_SIM4IA = {
    "columns": (FIRST + "1,2,3\n", "line 2: 3 columns, expected 8: row, user, session_id"),
    "time": (FIRST + "2,u,4,q,now,[],a,[]\n", "line 2: column 'date': was 'now', expected a time"),
    "session": (
        FIRST + "2,u, ,q,2025-01-10 20:55:48,[],a,[]\n",
        "line 2: column 'session_id': was ' '",
    ),
    "clicks": (
        FIRST + "2,u,4,q,2025-01-10 20:55:48,[],a,2\n",
        r"line 2: column 'clicks': was '2', expected a list",
    ),
    "quote": (FIRST + '2,u,4,"q\n\nx', "line 2: not CSV"),
    "again": (
        FIRST + FIRST.replace(",4,", ",5,") + FIRST,
        r"line 3: column 'session_id': was '4' again after other sessions",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_SIM4IA.values(), ids=BAD_SIM4IA)
def test_a_wrong_sim4ia_row_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"bad\.csv: {message}"):
        read(text(tmp_path / "bad.csv", content))


@pytest.mark.parametrize("indent", [None, 4])
def test_ikat_turns_of_every_year(tmp_path, indent):
    sessions, left_out = read(text(tmp_path / "topics.json", json.dumps(IKAT, indent=indent)))
    assert [session.id for session in sessions] == ["ikat-9-1-2", "ikat-9-1-3", "ikat-10-2"]
    assert [session.user for session in sessions] == ["ikat-topic-9"] * 2 + ["ikat-topic-10"]
    assert sessions[1] == Session(
        id="ikat-9-1-3",
        user="ikat-topic-9",
        source="ikat",
        profile=("I like tea.", "I am tall."),
        history=tuple(Event("utterance", said) for said in ("Hello?", "And it?", "Why?")),
        targets=("Why tea?",),
    )
    assert sessions[2].profile == ("I run.",)
    assert left_out == {"first turn of a topic": 2, "turn without a resolved utterance": 1}


def test_variants_of_an_ikat_topic_are_one_user_whatever_space_is_in_their_numbers(tmp_path):
    topics = [IKAT[0] | {"number": number} for number in ("9-1", "9\u2028-2", " 9 - 3")]
    sessions, _ = read(text(tmp_path / "topics.json", json.dumps(topics)))
    assert {session.user for session in sessions} == {"ikat-topic-9"}


TOPIC = json.dumps(IKAT[0])
BAD_IKAT = {
    "not json": (f"[{TOPIC},\n{{'number'", r"line 2: not JSON: .* at column 2"),
    "no list": ('{"number": 1}', r"line 1: column 1: was .*, expected a JSON list of topics"),
    "no topic": (f"[{TOPIC},\n\n 3]", "line 3: column 2: was '3]', expected an object"),
    "no comma": (f"[{TOPIC}\n{TOPIC}]", "line 2: column 1: .*expected a comma or the end"),
    "cut off": (f"[{TOPIC}", "line 1: column [0-9]+: was the end of the file, expected a comma"),
    "space of Unicode": (f"[{TOPIC}\u0085,\n{TOPIC}]", r"line 1: .*expected a comma or the end"),
    "line separator": (f"[{TOPIC},\u2028{TOPIC}]", "line 1: not JSON: .* at column "),
    "more": (f"[{TOPIC}]\nx", "line 2: column 1: was 'x', expected nothing after the list"),
    "no number": (f"[{TOPIC},\n{{}}]", "line 2: field 'number': missing"),
    "twice": (f"[{TOPIC},\n{TOPIC}]", r"line 2: field 'id': was '9-1'.*line 1 has it too"),
    "no turns": (f"[{TOPIC},\n" + '{"number": 1}]', "line 2: field 'turns': missing"),
    "no utterance": (
        '[\n{"number": 1, "turns": [{"utterance": "a"}, {"utterance": " "}]}]',
        r"line 2: field 'turns\[1\]\.utterance': was ' ', expected a text",
    ),
    "ptkb": (
        '[\n{"number": 1, "ptkb": {"1": "a", "2": 3}, "turns": []}]',
        r"line 2: field 'ptkb\[2\]': was 3",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_IKAT.values(), ids=BAD_IKAT)
def test_a_wrong_ikat_topic_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=rf"bad\.json: {message}"):
        read(text(tmp_path / "bad.json", content), format="ikat")


def test_chat_user_turns(tmp_path):
    alone = {"messages": [{"role": "user", "content": "hello"}]}
    named = CHAT | {"id": 12, "user": "ann"}
    rows = [json.dumps(row) for row in (CHAT, alone, named, CHAT)]
    sessions, left_out = read(text(tmp_path / "c.jsonl", "\n".join(rows)))
    first, second, third = sessions
    assert (first.history, first.targets) == ((Event("utterance", "tea"),), ("green tea",))
    assert (second.id, second.user) == ("12", "ann")
    assert [first.id, third.id] == ["chat-1", "chat-4"]
    assert first.user == third.user != "ann"  # the same conversation: never in two splits
    assert left_out == {"conversation with fewer than 2 user turns": 1}


BAD_CHAT = {
    "no list": ({"messages": "x"}, r"line 2: field 'messages': was 'x', expected a list"),
    "no object": ({"messages": ["x"]}, r"line 2: field 'messages\[0\]': was 'x'"),
    "no role": ({"messages": [{"content": "x"}]}, r"line 2: field 'messages\[0\].role': missing"),
    "no content": (
        {"messages": [{"role": "user", "content": None}]},
        r"line 2: field 'messages\[0\].content': was None",
    ),
    "a part": (
        {"messages": [{"role": "user", "content": [3]}]},
        r"line 2: field 'messages\[0\].content': was \[3\]",
    ),
    "id twice": (CHAT | {"id": "chat-1"}, "line 2: field 'id': was 'chat-1'.*line 1 has it too"),
    "sessions": ({"targets": []}, "line 2: field 'messages': missing"),
}


@pytest.mark.parametrize(("row", "message"), BAD_CHAT.values(), ids=BAD_CHAT)
def test_a_wrong_chat_line_is_named(tmp_path, row, message):
    path = text(tmp_path / "bad.jsonl", f"{json.dumps(CHAT)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl: {message}"):
        read(path)


def test_qac_past_searches_and_prefix(tmp_path):
    ((session,), _) = read(parquet(tmp_path / "q.parquet", QAC))
    assert session == Session(
        id="qac-23",
        user="qac-783",
        source="qac",
        profile=(),
        history=(
            Event("search", "toys", "2023-10-07 13:03:54"),
            Event("search", "ultra magnus"),
            Event("prefix", "transf"),
        ),
        targets=("transformers",),
    )


def test_qac_training_rows_have_the_earlier_rows_of_their_session_as_past(tmp_path):
    sessions, left_out = read(parquet(tmp_path / "q.parquet", QAC_TRAIN))
    assert [[event.text for event in s.history] for s in sessions] == [["si"], ["sink", "p"]]
    assert [s.targets for s in sessions] == [("sink",), ("pot",)]
    assert left_out == {"row without a past search or a prefix": 1}


def test_a_wrong_parquet_file_is_named(tmp_path):
    rows = [dict(row) for row in QAC_TRAIN]
    rows[2]["final_search_term"] = None
    with pytest.raises(DataError, match=r"q\.parquet: row 3: column 'final_search_term': was None"):
        read(parquet(tmp_path / "q.parquet", rows))
    rows[2] = QAC_TRAIN[0]
    with pytest.raises(DataError, match=r"row 3: column 'query_id': was 1.*\(row 1 has it too\)"):
        read(parquet(tmp_path / "q.parquet", rows))
    with pytest.raises(DataError, match="no column 'session_id', expected .*; it has final_sea"):
        read(parquet(tmp_path / "q.parquet", [{"final_search_term": "x"}]))
    with pytest.raises(DataError, match=r"cut\.parquet: not a sound parquet file"):
        read(text(tmp_path / "cut.parquet", "PAR1 and no more"))


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'tppo-kernels\[data\]'"):
        read(text(tmp_path / "q.parquet", "PAR1"))


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.txt", AOL, "aol"),
        ("a", "\ufeff\n" + AOL, "aol"),
        ("a.csv", SIM4IA, "sim4ia"),
        ("a.json", json.dumps(IKAT, indent=2), "ikat"),
        ("a.jsonl", json.dumps(CHAT), "chat"),
        ("a", json.dumps(CHAT), "chat"),
        ("a.jsonl", '{"id": 1}', "sessions"),
        ("a.jsonl", "[1]", "sessions"),
        ("a.jsonl", "", "sessions"),
        ("a.bin", "PAR1", "qac"),
    ],
)
def test_detection(tmp_path, name, content, format):
    assert detect_format(text(tmp_path / name, content)) == format


def test_a_file_like_no_format_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt: first line was 'hello', which is like no form"):
        detect_format(text(tmp_path / "a.txt", "hello\n"))
    with pytest.raises(DataError, match=r"a\.txt: empty, expected a log"):
        detect_format(text(tmp_path / "a.txt", "\n\n"))
    with pytest.raises(DataError, match="absent.txt: cannot be read: No such file"):
        detect_format(tmp_path / "absent.txt")
