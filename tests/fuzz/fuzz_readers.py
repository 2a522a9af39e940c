"""Readers of logs against parsers of a few lines each, written here from the formats' description.

An input is a byte that chooses name and packing, and the bytes of the file. What must hold: a file
is read to the sessions that the parser here finds, or refused by DataError that names it; with rows
left out the count of sound and wrong rows is that of the file; what was read is written and read
again unchanged.
"""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from files import folder, sound_text
from guided import REFUSED, Target, Wrong

from tppo.errors import DataError
from tppo.sessions.readers import ReadConfig, SessionLog
from tppo.sessions.session import Event, Session, read_sessions, write_sessions

REMEDY = "; --on-bad-row skip leaves such rows out"
Fields = tuple[Any, ...]


class Bad(Exception):
    """A row that the parser here finds wrong."""


def clean(text: str) -> str:
    return " ".join(text.split())


def need(ok: object) -> None:
    if not ok:
        raise Bad


def texts(given: Any) -> tuple[str, ...]:
    need(isinstance(given, list) and all(map(sound_text, given)))
    return tuple(map(clean, given))


def objects(data: bytes, listed: bool) -> Iterator[Any]:
    """The objects of a file; Bad, as a value, for a line that is none."""
    if not listed:
        for raw in data.split(b"\n"):
            if raw.strip():
                try:
                    value = json.loads(raw.decode())
                    yield value if isinstance(value, dict) else Bad()
                except (ValueError, RecursionError):
                    yield Bad()
        return
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError):
        raise Bad from None
    need(isinstance(found, list))
    yield from (value if isinstance(value, dict) else Bad() for value in found)


def plain_session(row: dict[str, Any]) -> Fields:
    need(all(sound_text(row.get(key)) for key in ("id", "user", "source")))
    need(isinstance(row.get("history"), list) and row.get("targets"))
    events = []
    for event in row["history"]:
        need(isinstance(event, dict) and sound_text(event.get("type")))
        time, clicks = event.get("time"), event.get("clicks")
        need(sound_text(event.get("text")) and (time is None or sound_text(time)))
        need(clicks is None or type(clicks) is int and clicks >= 0)
        events.append(Event(clean(event["type"]), clean(event["text"]), time, clicks))
    intent = row.get("latent_intent")
    intent = {} if intent is None else intent
    need(isinstance(intent, dict) and all(map(sound_text, [*intent, *intent.values()])))
    profile = [] if row.get("profile") is None else row["profile"]
    return (
        clean(row["id"]),
        clean(row["user"]),
        texts(profile),
        tuple(events),
        texts(row["targets"]),
        tuple((k, clean(v)) for k, v in intent.items()),
    )


def chat_session(row: dict[str, Any]) -> Fields | None:
    messages = row.get("messages" if "messages" in row else "conversations")
    need(isinstance(messages, list))
    turns = []
    for message in messages:
        need(isinstance(message, dict))
        named = (
            ("from", "value")
            if "role" not in message and "from" in message
            else ("role", "content")
        )
        speaker, content = message.get(named[0]), message.get(named[1])
        need(sound_text(speaker))
        if speaker.strip().lower() not in ("user", "human"):
            continue
        if isinstance(content, list):
            need(all(isinstance(part, dict) for part in content))
            shown = [
                part.get("text") if part.get("type") in ("text", "input_text") else ""
                for part in content
            ]
            need(all(isinstance(text, str) for text in shown))
            content = " ".join(shown)
        need(isinstance(content, str) and not re.search("[\ud800-\udfff]", content))
        if clean(content):
            turns.append(clean(content))
    if len(turns) < 2:
        return None
    for key in ("id", "user"):
        need(row.get(key) is None or sound_text(row[key]) or type(row[key]) is int)
    events = tuple(Event("utterance", turn) for turn in turns[:-1])
    id, user = ("" if row.get(key) is None else clean(str(row[key])) for key in ("id", "user"))
    return id, user, (), events, (turns[-1],), ()


def rows_of(
    data: bytes, listed: bool, row: Callable[[Any], Fields | None]
) -> tuple[list[Any], int]:
    """(what each row holds, how many are wrong); an id that is used twice is wrong."""
    found: list[Any] = []
    wrong, ids = 0, set()
    for value in objects(data, listed):
        try:
            need(not isinstance(value, Bad))
            made = row(value)
            if made is not None:
                need(not made[0] or made[0] not in ids)
                ids.add(made[0])
            found.append(made)
        except Bad:
            wrong += 1
    return found, wrong


def fields_of(session: Session) -> Fields:
    return (
        session.id,
        session.user,
        session.profile,
        session.history,
        session.targets,
        session.intent,
    )


def check_objects(data: bytes, kind: str, sessions: list[Session], log: SessionLog) -> None:
    """Sessions and wrong rows are those of the parser here."""
    listed = log.path.suffix == ".json" and data.lstrip().startswith(b"[")
    row = plain_session if kind == "sessions" else chat_session
    wanted, wrong = rows_of(data.removeprefix(b"\xef\xbb\xbf"), listed, row)
    if log.bad.count != wrong:
        raise Wrong(f"{kind}: {log.bad.count} wrong rows, expected {wrong}: {log.bad.first}")
    made = [fields for fields in wanted if fields is not None]
    if sum(log.left_out.values()) != len(wanted) - len(made):
        raise Wrong(f"{kind}: left out {log.left_out}, expected {len(wanted) - len(made)}")
    for session, fields in zip(sessions, made, strict=True):
        got = fields_of(session)
        same = got[2:] == fields[2:]
        given = all(not want or got[i] == want for i, want in enumerate(fields[:2]))
        if not (same and given):
            raise Wrong(f"{kind}: was {got}, expected {fields}")


def searches_of_aol(data: bytes, gap_s: float, targets: int) -> tuple[list[Fields], int]:
    """(user, history, targets) of each session, and how many rows are wrong."""
    rows, wrong = [], 0
    for raw in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            line = raw.decode().rstrip("\r\n")
            cells = [cell.strip() for cell in line.split("\t")]
            if not line.strip() or line.split("\t")[0] == "AnonID":
                continue
            need(len(cells) in (3, 5) and cells[0])
            time = datetime.fromisoformat(cells[2])
            need(time.tzinfo is None)
            rank, url = cells[3:] if len(cells) == 5 else ("", "")
            gap = ("nan", "<na>", "na", "n/a", "none", "null")
            need(
                not rank
                or rank.isdecimal()
                or rank.lower() in gap
                and rank.isascii()
                or re.fullmatch(r"[0-9]+\.0*", rank)
            )
            if clean(cells[1]) not in ("", "-"):
                rows.append(
                    (cells[0], clean(cells[1]), time, "" if url.casefold() in gap else clean(url))
                )
        except (Bad, ValueError):
            wrong += 1
    found, seen = [], set()
    for user, group in groupby(rows, key=lambda row: row[0]):
        if user in seen:
            wrong += 1
            continue
        seen.add(user)
        ordered = sorted(group, key=lambda row: row[2])
        parts = [[ordered[0]]]
        for before, row in zip(ordered, ordered[1:], strict=False):
            if (row[2] - before[2]).total_seconds() > gap_s:
                parts.append([])
            parts[-1].append(row)
        for part in parts:
            searches = [
                (query, list(same)) for query, same in groupby(part, key=lambda row: row[1])
            ]
            if len(searches) > targets:
                events = []
                for query, same in searches[:-targets]:
                    clicks = [row for row in same if row[3]]
                    events.append(Event("search", query, str(same[0][2]), len(clicks)))
                    events += [Event("click", row[3], str(row[2])) for row in clicks]
                found.append(
                    (f"aol-{user}", tuple(events), tuple(query for query, _ in searches[-targets:]))
                )
    return found, wrong


def check_aol(data: bytes, sessions: list[Session], log: SessionLog) -> None:
    wanted, wrong = searches_of_aol(data, 1800.0, 3)
    if log.bad.count != wrong:
        raise Wrong(f"aol: {log.bad.count} wrong rows, expected {wrong}: {log.bad.first}")
    got = [(s.user, s.history, s.targets) for s in sessions]
    if got != wanted:
        raise Wrong(f"aol: was {got}, expected {wanted}")


def check_sim4ia(data: bytes, sessions: list[Session], log: SessionLog) -> None:
    """Queries of sound files, in order and without repetition, by Python's own csv."""
    if log.bad.count:
        return
    lines = io.StringIO(data.removeprefix(b"\xef\xbb\xbf").decode(), newline="\n")
    rows = [row for row in csv.reader((line for line in lines), strict=True) if row]
    head = [cell.strip().lower() for cell in rows[0]]
    named = {"session_id", "query", "date"} <= set(head)
    at = head.index if named else ("row", "user", "session_id", "query").index
    cells = [(row[at("session_id")].strip(), clean(row[at("query")])) for row in rows[named:]]
    wanted = []
    for _, group in groupby([cell for cell in cells if cell[1]], key=lambda cell: cell[0]):
        queries = [query for query, _ in groupby(query for _, query in group)]
        if len(queries) > 1:
            wanted.append(queries)
    got = [[*(event.text for event in s.history), *s.targets] for s in sessions]
    if got != wanted:
        raise Wrong(f"sim4ia: was {got}, expected {wanted}")


def check_ikat(data: bytes, sessions: list[Session], log: SessionLog) -> None:
    """Of every session the target is a rewrite of the file, and its history grows turn by turn."""
    rewrites = {
        clean(turn["resolved_utterance"])
        for topic in objects(data.removeprefix(b"\xef\xbb\xbf"), True)
        if isinstance(topic, dict)
        for name in ("turns", "responses")
        if isinstance(topic.get(name), list)
        for turn in topic[name]
        if isinstance(turn, dict) and isinstance(turn.get("resolved_utterance"), str)
    }
    for session in sessions:
        if session.targets[0] not in rewrites or len(session.history) < 2:
            raise Wrong(f"ikat: was {session}, expected a rewrite behind at least two utterances")


CHECKS: dict[str, Callable[[bytes, list[Session], SessionLog], None]] = {
    "sessions": lambda *given: check_objects(given[0], "sessions", *given[1:]),
    "chat": lambda *given: check_objects(given[0], "chat", *given[1:]),
    "aol": check_aol, "sim4ia": check_sim4ia, "ikat": check_ikat,
}  # fmt: skip
SUFFIX = {"sessions": ".jsonl", "chat": ".jsonl", "aol": ".tsv", "sim4ia": ".csv", "ikat": ".json"}


def read(path: Path, config: ReadConfig) -> tuple[SessionLog | None, list[Session], str]:
    """(the log, its sessions, the message of the error)."""
    log = None
    try:
        log = SessionLog(path, config)
        return log, list(log), ""
    except DataError as error:
        if not str(error).startswith(str(path)):
            raise Wrong(f"a message that does not name the file: {error}") from error
        return log, [], str(error)


def reader(kind: str) -> Callable[[bytes], str | None]:
    """What calls the reader of a format."""

    def call(data: bytes) -> str | None:
        way, data = data[:1] or b"\0", data[1:]
        suffix = ".json" if way[0] & 1 and kind in ("sessions", "chat") else SUFFIX[kind]
        path = folder() / f"log{suffix}"
        path.write_bytes(gzip.compress(data, 1, mtime=0) if way[0] & 2 else data)
        given = "auto" if way[0] & 4 else kind
        stop, sessions, error = read(path, ReadConfig(format=given))  # type: ignore[arg-type]
        skip, kept, other = read(path, ReadConfig(format=given, on_bad_row="skip"))  # type: ignore
        if stop is None or skip is None:
            if other != error:
                raise Wrong(f"was {other!r}, expected {error!r}")
            return REFUSED
        if not error and (kept != sessions or other or skip.bad.count):
            raise Wrong(f"skip gives {kept}, {other!r}, {skip.bad.first}, stop {sessions}")
        if error.endswith(REMEDY) and not other and error[: -len(REMEDY)] != skip.bad.first[0]:
            raise Wrong(f"skip names {skip.bad.first[0]!r} first, stop {error!r}")
        if error and not error.endswith(REMEDY) and other != error:
            raise Wrong(f"skip ends with {other!r}, stop with {error!r}")
        if not other and not data.startswith(b"\x1f\x8b"):
            CHECKS[skip.format](data, kept, skip)
        again = folder() / "again.jsonl"
        write_sessions(again, kept)
        unique = len({session.id for session in kept}) == len(kept)
        if kept and unique and read_sessions(again) != kept:
            raise Wrong(f"written and read again: {read_sessions(again)}, was {kept}")
        return REFUSED if error else None

    return call


def example(kind: str) -> Callable[[], list[bytes]]:
    return lambda: [bytes([way]) + text.encode() for text in EXAMPLES[kind] for way in (0, 2, 4)]


_SESSION = {
    "id": "s1",
    "user": "u1",
    "source": "log",
    "profile": ["lives in Oslo"],
    "history": [
        {"type": "search", "text": "trail shoes", "time": "2024", "clicks": 2},
        {"type": "click", "text": "https://a.example"},
    ],
    "targets": ["trail shoes wide", "wide boots"],
    "latent_intent": {"item": "shoes"},
}
_CHAT = {
    "id": 7,
    "user": "u",
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {}}],
        },
    ],
}
_SHARE = {
    "conversations": [
        {"from": "human", "value": "a b"},
        {"from": "gpt", "value": "c"},
        {"from": "human", "value": "d"},
    ]
}
_TOPIC = {
    "number": "1-1",
    "ptkb": {"1": "I run", "2": "I bike"},
    "turns": [
        {"turn_id": 1, "utterance": "shoes?", "resolved_utterance": "running shoes?"},
        {"turn_id": 2, "utterance": "wide?", "resolved_utterance": "wide running shoes?"},
    ],
}
_TOPIC_2025 = {
    "number": 9,
    "ptkb": ["I run"],
    "responses": [{"user_utterance": "a"}, {"user_utterance": "b", "resolved_utterance": "b of a"}],
}
_AOL = [
    "AnonID\tQuery\tQueryTime\tItemRank\tClickURL",
    *(
        f"{user}\t{query}\t2006-03-01 0{hour}:17:12\t{rank}\t{url}"
        for user, query, hour, rank, url in (
            ("7", "boots", 7, "", ""),
            ("7", "boots", 7, "1", "http://a"),
            ("7", "wide boots", 7, "", ""),
            ("7", "red boots", 7, "", ""),
            ("7", "red wide boots", 7, "2.0", "nan"),
            ("8", "-", 8, "", ""),
            ("8", "cat", 9, "", ""),
        )
    ),
]
_SIM = [
    "1,u,s1,shoes,2025-01-10 20:55:48,10,q1,\"[('d', datetime.datetime(2025, 1, 1), 'works')]\"",
    "2,u,s1,wide shoes,2025-01-10 20:56:48,10,q2,[]",
    '1,u,s2,"a, b",2025-01-10 20:55:48,1,q3,',
    "2,u,s2,c,2025-01-10 20:55:49,1,q4,",
]
EXAMPLES = {
    "sessions": [
        json.dumps(_SESSION) + "\n" + json.dumps({**_SESSION, "id": "s2"}) + "\n",
        json.dumps([_SESSION, {**_SESSION, "id": "s2"}], indent=1),
    ],
    "chat": [json.dumps(_CHAT) + "\n" + json.dumps(_SHARE), json.dumps([_SHARE, _CHAT])],
    "ikat": [json.dumps([_TOPIC, _TOPIC_2025], indent=1)],
    "aol": ["\n".join(_AOL), "\n".join("\t".join(line.split("\t")[:3]) for line in _AOL)],
    "sim4ia": ["\n".join(_SIM), "session_id,query,date\ns,a,2025-01-10 20:55:48\ns,b,2025-01-10"],
}
TARGETS = [
    Target(
        f"reader of {kind}",
        reader(kind),
        30_000,
        example(kind),
        ("tppo/sessions/", "tppo/store/jsonl"),
        words,
    )
    for kind, words in (
        ("sessions", (b'"history"', b'"targets"')),
        ("chat", (b'"messages"', b'"human"')),
        ("ikat", (b'"responses"',)),
        ("aol", (b"\t", b"7\tboots\t2006-03-01 07:17:12", b"-")),
        ("sim4ia", (b'"', b",", b"2025-01-10 20:55:48", b"s1")),
    )
]
