"""`tppo data inspect FILE`: what a log holds, and what would make its figures too good."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import tyro

from tppo.console import is_unicode
from tppo.flags import parse
from tppo.labels.words import count_words
from tppo.progress import say, track, warn
from tppo.sessions.duplicates import exact_key, near_key, normalize
from tppo.sessions.readers import ReadConfig, SessionLog
from tppo.sessions.session import Session
from tppo.settings import Natural, Seed, section
from tppo.store.fingerprints import Fingerprints, fingerprint
from tppo.store.jsonl import plain

SEARCH = "search"  # type of the events whose text is a query
CLICK = "click"  # type of the events whose text is an address
UNSPACED = {"Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar"}
LONGEST = 10_000  # longer texts and histories count as this long


@section
class Options:
    """Flags of `tppo data inspect`."""

    file: Annotated[Path, tyro.conf.Positional]
    """A log in any of the formats."""
    examples: Natural = 3
    """Sessions to show, drawn at random."""
    seed: Seed = 0
    """Decides which sessions are shown."""
    json: bool = False
    """Print the figures as JSON."""
    read: Annotated[ReadConfig, tyro.conf.arg(name="")] = field(default_factory=ReadConfig)


def main(arguments: Sequence[str]) -> None:
    """Entry point of `tppo data inspect`."""
    try:
        about = "What a log holds: lengths, duplicates, leaks of targets, examples."
        options = parse(Options, "tppo data inspect", about, arguments)
        figures = inspect_log(options.file, options.read, options.examples, options.seed)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"tppo data inspect: {error}")
    if options.json:
        print(json.dumps(plain(figures), ensure_ascii=not is_unicode(sys.stdout)))
    else:
        print(report(figures))
    if not figures["sessions"]:
        warn("WARNING: 0 sessions were kept, there is nothing to train on: "
             f"see what was left out, and whether the format is {figures['format']}")  # fmt: skip
    wrong = figures["bad_rows"]["count"]
    if wrong and options.read.on_bad_row == "stop":
        sys.exit(f"tppo data inspect: {wrong:,} rows are wrong, each is named above; `tppo data` "
                 "stops at the first, or leaves them out with --on-bad-row skip")  # fmt: skip


def inspect_log(path: Path, config: ReadConfig, examples: int = 3, seed: int = 0) -> dict[str, Any]:
    """The figures of a log, in one reading and in memory that grows by hashes alone.

    Every wrong row is reported on stderr, naming line and column, and left out.
    Errors: DataError for a file that cannot be read.
    """
    log = SessionLog(path, config, tell=say)
    seen, drawn = _Figures(), _Sample(examples, seed)
    for session in track(log, f"inspect ({log.format})"):
        seen.add(session)
        drawn.add(session)
    return {
        "file": str(path),
        "format": log.format,
        **seen.result(),
        "left_out": dict(log.left_out),
        "bad_rows": {"count": log.bad.count, "first": log.bad.first},
        "examples": drawn.sessions,
    }


class _Lengths:
    """Counts of whole numbers up to LONGEST: any number of them in bounded memory."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self.counts[min(length, LONGEST)] += 1

    def result(self) -> dict[str, float]:
        total = sum(self.counts.values())
        return {
            "mean": sum(n * count for n, count in self.counts.items()) / max(total, 1),
            "median": self._quantile(0.5),
            "p99": self._quantile(0.99),
            "max": max(self.counts, default=0),
        }

    def _quantile(self, share: float) -> int:
        left = share * sum(self.counts.values())
        for length in sorted(self.counts):
            left -= self.counts[length]
            if left <= 0:
                return length
        return 0


class _Figures:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.users, self.exact, self.near = Fingerprints(), Fingerprints(), Fingerprints()
        self.lengths = {
            name: _Lengths()
            for name in ("history_events", "targets", "words_per_query", "words_per_target")
        }

    def add(self, session: Session) -> None:
        self.count["sessions"] += 1
        self.users.add(session.user)
        self._add_duplicate(session)
        self.events.update(event.type for event in session.history)
        self.count["with_profile"] += bool(session.profile)
        self.count["with_times"] += any(event.time is not None for event in session.history)
        self.lengths["history_events"].add(len(session.history))
        self.lengths["targets"].add(len(session.targets))
        for event in session.history:
            if event.type != CLICK:
                self.lengths["words_per_query"].add(count_words(event.text))
                self.characters.update(event.text)
        for target in session.targets:
            self.lengths["words_per_target"].add(count_words(target))
            self.characters.update(target)
        self._add_leaks(session)

    def _add_duplicate(self, session: Session) -> None:
        user = fingerprint(session.user) >> 1
        if not self.exact.add(exact_key(session)):
            self.count["exact_duplicates"] += 1
        key, before = near_key(session), len(self.near)
        first = self.near.setdefault(key, user)
        if len(self.near) == before:
            self.count["near_duplicates"] += 1
            self.count["near_duplicates_of_another_user"] += first != user

    def _add_leaks(self, session: Session) -> None:
        literal = {event.text.casefold() for event in session.history}
        folded = {normalize(text) for text in literal}
        # Spaces at both ends, so that a target is looked for as whole words.
        prompt = "\n".join(map(normalize, (*session.profile, *literal)))
        prompt = f" {prompt} ".replace("\n", " \n ")
        searches = [event.text for event in session.history if event.type == SEARCH]
        newest = [event.text for event in session.history][-1:]
        last = normalize((searches or newest or [""])[-1])
        for target in session.targets:
            key = normalize(target)
            self.count["targets"] += 1
            self.count["targets_in_history"] += target.casefold() in literal
            self.count["targets_in_history_normalized"] += key in folded
            self.count["targets_within_prompt"] += f" {key} " in prompt
            self.count["targets_equal_last_query"] += key == last
        leaks = any(target.casefold() in literal for target in session.targets)
        self.count["sessions_with_target_in_history"] += leaks

    def result(self) -> dict[str, Any]:
        names = (
            "sessions", "with_profile", "with_times", "targets", "exact_duplicates",
            "near_duplicates", "near_duplicates_of_another_user", "targets_in_history",
            "targets_in_history_normalized", "targets_within_prompt", "targets_equal_last_query",
            "sessions_with_target_in_history",
        )  # fmt: skip
        return {
            "users": len(self.users),
            **{name: self.count[name] for name in names},
            "events": dict(self.events),
            "scripts": scripts(self.characters),
            "lengths": {name: lengths.result() for name, lengths in self.lengths.items()},
        }


def scripts(characters: Counter[str]) -> dict[str, int]:
    """Letters of each script, most first; a script by the first word of its letters' names."""
    found: Counter[str] = Counter()
    for character, n in characters.items():
        plain = unicodedata.normalize("NFKC", character)[:1]
        if plain.isalpha():
            name = unicodedata.name(plain, "unnamed").split()[0].capitalize()
            found[{"Cjk": "Han"}.get(name, name)] += n
    return dict(found.most_common())


class _Sample:
    """A sample without replacement of a stream (algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng, self.seen = size, random.Random(f"{seed}/inspect"), 0
        self.sessions: list[Session] = []

    def add(self, session: Session) -> None:
        self.seen += 1
        place = self.rng.randrange(self.seen)
        if len(self.sessions) < self.size:
            self.sessions.append(session)
        elif place < self.size:
            self.sessions[place] = session


def report(figures: dict[str, Any]) -> str:
    """The figures for a reader."""
    sessions = figures["sessions"]

    def part(name: str, whole: int) -> str:
        return f"{figures[name]:,} of {whole:,} ({figures[name] / max(whole, 1):.1%})"

    left_out = "; ".join(f"{n:,}: {why}" for why, n in figures["left_out"].items()) or "none"
    rows = [
        ("format", figures["format"]),
        ("sessions", f"{sessions:,}"),
        ("left out", left_out),
        ("wrong rows", f"{figures['bad_rows']['count']:,}"),
    ]
    if sessions:
        rows += _figure_rows(figures, part)
    lines = [figures["file"], *(f"  {name:<24}{value}" for name, value in rows)]
    for session in figures["examples"]:
        lines += ["", f"session {session.id} of user {session.user}"]
        lines += [f"  profile: {_cut(text)}" for text in session.profile]
        lines += [f"  {event.type}: {_cut(event.text)}" for event in session.history]
        lines += [f"  -> {_cut(target)}" for target in session.targets]
    return "\n".join(lines)


def _figure_rows(figures: dict[str, Any], part: Callable[[str, int], str]) -> list[tuple[str, str]]:
    sessions, targets = figures["sessions"], figures["targets"]
    events = ", ".join(f"{n:,} {kind}" for kind, n in sorted(figures["events"].items()))
    return [
        ("users", f"{figures['users']:,}"),
        ("events", events or "none"),
        ("scripts", _scripts_row(figures["scripts"])),
        ("with profile", part("with_profile", sessions)),
        ("with times", part("with_times", sessions)),
        *((name.replace("_", " "), _row(v)) for name, v in figures["lengths"].items()),
        ("exact duplicates", part("exact_duplicates", sessions)),
        ("near duplicates", part("near_duplicates", sessions)),
        ("  of another user", part("near_duplicates_of_another_user", sessions)),
        ("targets in history", f"{part('targets_in_history', targets)} but for case"),
        ("  but for punctuation", part("targets_in_history_normalized", targets)),
        ("  within the prompt", part("targets_within_prompt", targets)),
        ("repeat last query", f"{part('targets_equal_last_query', targets)} right"),
    ]


def _scripts_row(found: dict[str, int]) -> str:
    letters = sum(found.values())
    shares = ", ".join(f"{name} {n / letters:.1%}" for name, n in found.items())
    unspaced = [name for name in found if name in UNSPACED]
    if unspaced:
        shares += f"; no spaces are written in {', '.join(unspaced)}: words by ICU's dictionaries"
    return shares or "no letters"


def _row(lengths: dict[str, float]) -> str:
    rest = ", ".join(f"{name} {lengths[name]:,}" for name in ("median", "p99", "max"))
    return f"mean {lengths['mean']:.2f}, {rest}"


def _cut(text: str, limit: int = 90) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
