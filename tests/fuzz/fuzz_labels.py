"""The other files that are read: labels, journals, cache, prompts, histories, pairs, batch answers.

An input is a byte that chooses how the file is packed, and its bytes. A file is read to what plain
`json` finds in it, or refused by DataError that names it and its line; a file of which damaged
lines are passed over keeps every sound one.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files import folder, sound_text
from fuzz_replies import RESPONSES
from guided import REFUSED, Target, Wrong

from tppo.errors import DataError
from tppo.labels.endpoint.ask import EndpointError
from tppo.labels.endpoint.batch import import_batch
from tppo.labels.endpoint.cache import Work
from tppo.labels.endpoint.config import EndpointConfig
from tppo.labels.endpoint.lost import lost_by_endpoint
from tppo.labels.endpoint.prompt import LabelItem
from tppo.labels.hand import HandLabels, HandPairs, Judged, Preferred, is_journal
from tppo.labels.journal import Without
from tppo.labels.label import read_labels, write_labels
from tppo.labels.words import fold, map_labels, word_spans
from tppo.sessions.session import session_of
from tppo.stages.answering.histories import read_file
from tppo.stages.answering.recipe import Recipe, read_recipe
from tppo.stages.preferences import read_preferences
from tppo.stages.prompts import read_prompts
from tppo.store.line_index import LineIndex

CONFIG = EndpointConfig(base_url="http://127.0.0.1:1/v1", model="m", api_key_env=None)


def rows_of(data: bytes) -> list[tuple[int, dict[str, Any] | None]]:
    """(line, its object or None) of the lines that are not blank."""
    found: list[tuple[int, dict[str, Any] | None]] = []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            try:
                value = json.loads(raw.decode())
            except (ValueError, RecursionError):
                value = None
            found.append((number, value if isinstance(value, dict) else None))
    return found


def file_of(data: bytes, name: str, packed: bool = True) -> tuple[Path, bytes]:
    """The file of an input, and its bytes as a reader sees them."""
    way, data = data[:1] or b"\0", data[1:]
    path = folder() / name
    path.write_bytes(gzip.compress(data, 1, mtime=0) if packed and way[0] & 2 else data)
    return path, data.removeprefix(b"\xef\xbb\xbf")


def refused(error: DataError, path: Path) -> str:
    if str(path) not in str(error):
        raise Wrong(f"a message that does not name {path}: {error}") from error
    return REFUSED


def labels(data: bytes) -> str | None:
    path, data = file_of(data, "labels.jsonl")
    try:
        found = read_labels(path)
    except DataError as error:
        return refused(error, path)
    rows = [row for _, row in rows_of(data)]
    got = [[x.id, x.response, [list(w) for w in x.words], x.sentence, x.labeller] for x in found]
    if got != [
        row and [row[k] for k in ("id", "response", "words", "sentence", "labeller")]
        for row in rows
    ]:
        raise Wrong(f"labels {got} of {rows}")
    write_labels(folder() / "again.jsonl", found)
    if read_labels(folder() / "again.jsonl") != found:
        raise Wrong(f"labels {found} are other ones when they are read again")
    return None


def sound_verdict(row: Any) -> bool:
    """Whether a line of the journal of words is one, by its description."""
    kinds = {"id": str, "annotator": str, "response": str, "words": list, "guidance": str}
    if not isinstance(row, dict) or not isinstance(row.get("annotator"), str):
        return False
    if row.get("how") in ("skipped", "undone") and isinstance(row.get("id"), str):
        return True
    number = row.get("seconds")
    return (
        all(isinstance(row.get(key), kind) for key, kind in kinds.items())
        and len(row["words"]) == len(word_spans(row["response"]))
        and all(value in (-1, 0, 1) for value in row["words"])
        and row.get("sentence") in (0, 1)
        and row.get("kind") in ("random", "check", "chosen")
        and isinstance(number, int | float)
        and number >= 0
    )


def journal(data: bytes) -> str | None:
    path, data = file_of(data, "journal.jsonl", packed=False)
    is_journal(path)
    found, pairs = HandLabels(path), HandPairs(path)
    for entry in found:
        entry.label()
    wanted = {(row["annotator"], row["id"]) for _, row in rows_of(data) if sound_verdict(row)}
    known = {key for key in wanted if key in found}
    said = {(entry.annotator, entry.id) for entry in found}
    if not said <= wanted:
        raise Wrong(f"the journal has {said}, the file {wanted}")
    assert all(isinstance(entry, Judged) for entry in found)
    assert all(isinstance(entry, Preferred) for entry in pairs)
    found.add(Without("new", "who", "skipped"))
    again = HandLabels(path)
    if ("who", "new") not in again or {k for k in known if k in again} != known:
        raise Wrong("a journal that is continued and read again is another one")
    return None


def cache(data: bytes) -> str | None:
    path, data = file_of(data, "cache.jsonl", packed=False)
    work = Work(CONFIG, path)
    for _, row in rows_of(data):
        key = row.get("key") if row else None
        found = work.get(key) if sound_text(key) else None
        if found is not None and (
            found.sentence not in (0, 1) or any(word.label not in (0, 1) for word in found.words)
        ):
            raise Wrong(f"judgement {found}")
        if found is None and row and set(row) == {"key", "words", "sentence"} and sound_text(key):
            first = next(r for _, r in rows_of(data) if r and r.get("key") == key)
            whole = (
                all(
                    isinstance(w, dict)
                    and set(w) == {"word", "label"}
                    and type(w["label"]) is int
                    and w["label"] in (0, 1)
                    and sound_text(w["word"])
                    for w in first["words"]
                )
                if isinstance(first.get("words"), list)
                else False
            )
            if whole and type(first.get("sentence")) is int and first["sentence"] in (0, 1):
                raise Wrong(f"{path}: a sound line is lost: {first}")
    return None


def batch(data: bytes) -> str | None:
    path, data = file_of(data, "batch.jsonl")
    store = folder() / "batch-cache.jsonl"
    store.unlink(missing_ok=True)
    try:
        counts = import_batch(ITEMS, CONFIG, store, path)
    except DataError as error:
        return refused(error, path)
    except EndpointError as error:
        if not str(error).strip():
            raise Wrong("an error without a reason") from error
        return REFUSED
    if sum(counts.values()) != len(rows_of(data)):
        raise Wrong(f"{dict(counts)} of {len(rows_of(data))} lines")
    return None


def index(data: bytes) -> str | None:
    path, data = file_of(data, "sessions.jsonl", packed=False)
    try:
        with LineIndex(path, session_of) as found:
            for _, row in rows_of(data):
                id = " ".join(str(row["id"]).split()) if row else ""
                session = found.get(id)
                if session is None or session.id != id:
                    raise Wrong(f"the session of {row} is {session}")
    except DataError as error:
        return refused(error, path)
    return None


def histories(data: bytes) -> str | None:
    path, _ = file_of(data, "histories.jsonl")
    way = data[0] if data else 0
    recipe = Recipe(prompt="as given" if way & 4 else "history", events=("search", "click"))
    try:
        for found in read_file(path, recipe):
            if (found.session is None) == (found.prompt is None):
                raise Wrong(f"was {found}, expected a session or a prompt")
            if found.session and not all(
                map(sound_text, [*found.session.profile, *(e.text for e in found.session.history)])
            ):
                raise Wrong(f"a text that no prompt can hold: {found}")
            if isinstance(found.prompt, str) and not sound_text(found.prompt):
                raise Wrong(f"a prompt that no tokenizer takes: {found}")
    except DataError as error:
        if not str(error).startswith((str(path), "history ", "messages[")):
            raise Wrong(f"a message that does not name the place: {error}") from error
        return REFUSED
    return None


def prompts(data: bytes) -> str | None:
    path, data = file_of(data, "prompts.jsonl")
    rows = [row for _, row in rows_of(data)]
    error_of = []
    try:
        given = read_prompts(path)
        if given.prompts != [row and row["prompt"] for row in rows]:
            raise Wrong(f"prompts {given.prompts} of {rows}")
        if any(len(column) != len(rows) for column in given.columns.values()):
            raise Wrong("a column of another length")
        len(given.fingerprint)
        json.dumps(given.prompts, ensure_ascii=False).encode()
    except DataError as error:
        error_of.append(refused(error, path))
    try:
        for pair in read_preferences(path, skip_bad=bool(data[:1] and data[0] & 1)):
            if pair.answers[0] == pair.answers[1] or not all(map(sound_text, pair.answers)):
                raise Wrong(f"a pair of {pair.answers}")
    except DataError as error:
        if not str(error).startswith(("pairs:", str(path))):
            raise Wrong(f"a message that does not name the file: {error}") from error
        error_of.append(REFUSED)
    return REFUSED if len(error_of) == 2 else None


def records(data: bytes) -> str | None:
    """A recipe of a model, and the record of what was lost."""
    path, _ = file_of(data, "tppo.json", packed=False)
    lost_by_endpoint(path)
    try:
        read_recipe(folder())
    except DataError as error:
        return refused(error, path)
    return None


def mapped(data: bytes) -> str | None:
    """Labels of any words, of any text, at any offsets."""
    values = rows_of(data[1:])[:1]
    row = values[0][1] if values else None
    try:
        text, words, offsets = row["text"], row["words"], row["offsets"]  # type: ignore[index]
        pairs = [(a, b) for a, b in words if isinstance(a, str) and type(b) is int]
        spans = [(a, b) for a, b in offsets if type(a) is type(b) is int]
        assert isinstance(text, str)
    except (TypeError, KeyError, ValueError, AssertionError):
        return REFUSED
    try:
        found = map_labels(text, pairs, spans)
    except ValueError as error:
        if not str(error).strip():
            raise Wrong("an error without a reason") from error
        return REFUSED
    characters = map_labels(text, pairs, [(i, i + 1) for i in range(len(text))])
    for (a, b), category in zip(spans, found, strict=True):
        inner = set(characters[a:b]) or {0}
        if category not in inner:
            raise Wrong(f"category {category} of {text[a:b]!r}, whose characters have {inner}")
    labelled = {label for word, label in pairs if fold(word)}
    if not {c for c in characters if c > 0} <= {1 + label for label in labelled if label >= 0}:
        raise Wrong(f"categories {characters} of labels {labelled}")
    return None


ITEMS = [LabelItem(str(i), ["a"], ["b"], response) for i, response in enumerate(RESPONSES)]


def lines(*rows: Any) -> list[bytes]:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return [bytes([way]) + text.encode() for way in (0, 2)]


def journal_lines() -> list[bytes]:
    word = {
        "id": "1",
        "annotator": "ann",
        "response": "red boots",
        "words": [1, -1],
        "sentence": 1,
        "kind": "random",
        "guidance": "g",
        "seconds": 2.5,
        "foretold": [0.5, 0.25],
    }
    pair = {
        "id": "p",
        "annotator": "ann",
        "responses": ["a", "b"],
        "better": None,
        "left": 0,
        "guidance": "g",
        "seconds": 1,
    }
    without = {"id": "1", "annotator": "bob", "how": "undone"}
    return lines(word, without, pair, {**word, "id": "2", "kind": "check"})


def batch_lines() -> list[bytes]:
    work = Work(CONFIG, folder() / "none.jsonl")
    verdicts = [{"word": RESPONSES[0][a:b], "label": 1} for a, b in word_spans(RESPONSES[0])]
    answer = json.dumps(
        {"WORD_SEQUENCE_JUDGEMENTS": verdicts, "ACROSS_QUERY_JUDGEMENTS": {"label": 1}}
    )
    body = {"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}
    return lines(
        {"custom_id": work.key(ITEMS[0]), "response": {"status_code": 200, "body": body}},
        {"custom_id": work.key(ITEMS[1]), "response": None, "error": {"code": "x"}},
    )


_SESSION = {
    "id": "s 1",
    "user": "u",
    "source": "x",
    "history": [{"type": "search", "text": "a"}],
    "targets": ["b"],
}
EXAMPLES: dict[str, Callable[[], list[bytes]]] = {
    "labels": lambda: lines(
        *(
            {
                "id": str(i),
                "response": r,
                "words": [[r[a:b], i % 2] for a, b in word_spans(r)],
                "sentence": 1,
                "labeller": "rule",
            }
            for i, r in enumerate(RESPONSES)
        )
    ),
    "journal": journal_lines,
    "cache": lambda: lines(
        {"key": "k", "words": [{"word": "a", "label": 1}], "sentence": 0},
        {"key": "l", "words": [], "sentence": 1},
    ),
    "batch": batch_lines,
    "index": lambda: lines(_SESSION, {**_SESSION, "id": "t"}),
    "histories": lambda: [
        *lines(
            {
                "history": ["search: a", {"type": "click", "text": "b"}],
                "profile": ["c"],
                "id": 1,
                "queries": 2,
            },
            {"messages": [{"role": "user", "content": "a\nb"}]},
        ),
        *(
            bytes([way]) + text
            for way in (0, 4)
            for text in (
                b"search: a\nclick: b\nprofile: c\n\nd\n",
                b'{"prompt": "a"}\n{"prompt": "b", "id": 2}',
            )
        ),
    ],
    "prompts": lambda: [
        *lines({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None}),
        *lines({"prompt": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"}),
        *lines({"prompt": "a", "answers": ["b", "c"]}),
        *lines(
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "c"},
                ],
            }
        ),
    ],
    "records": lambda: lines(
        {
            "prompt": "history",
            "queries": 2,
            "events": ["search"],
            "version": 1,
            "paid": {"mode": "argmax", "values": [0, 1, 2]},
        },
        {"id": "1", "by": "endpoint", "reason": "r"},
    ),
    "mapped": lambda: [
        x
        for r in RESPONSES
        for x in lines(
            {
                "text": r,
                "words": [[r[a:b], a % 2] for a, b in word_spans(r)],
                "offsets": [[i, i + 2] for i in range(len(r) - 1)],
            }
        )
    ],
}
_RUN: dict[str, tuple[str, Callable[[bytes], Any], int]] = {
    "labels": ("file of labels", labels, 30_000),
    "journal": ("journal by hand", journal, 25_000),
    "cache": ("cache of answers", cache, 30_000),
    "batch": ("batch of answers", batch, 20_000),
    "index": ("index of lines", index, 20_000),
    "histories": ("histories", histories, 40_000),
    "prompts": ("prompts and pairs", prompts, 40_000),
    "records": ("recipe and record", records, 20_000),
    "mapped": ("labels to characters", mapped, 50_000),
}
TARGETS = [
    Target(
        name,
        run,
        share,
        EXAMPLES[key],
        ("tppo/labels/", "tppo/store/", "tppo/stages/", "tppo/settings"),
    )
    for key, (name, run, share) in _RUN.items()
]
