"""Stage `data`: a log becomes the files train, heldout and test, line by line; split by user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from tppo.errors import DataError
from tppo.progress import say, track
from tppo.sessions.config import SessionsConfig
from tppo.sessions.duplicates import without_duplicates
from tppo.sessions.readers import SessionLog
from tppo.sessions.session import Session, session_line, write_sessions
from tppo.sessions.synthetic import generated_splits
from tppo.store.fingerprints import fingerprint
from tppo.store.jsonl import atomic_file

__all__ = ["split_log", "splitter", "write_generated"]

SPLITS = ("train", "heldout", "test")
SMALL = 10_000  # sessions that are held in memory, to give a small log its exact shares


def split_log(path: Path, config: SessionsConfig, seed: int, out: Path) -> Counter[str]:
    """Write the sessions of a log to `out/{train,heldout,test}.jsonl`, without duplicates.

    Memory does not grow with the log but for 8-byte hashes (`Fingerprints`).

    Returns the sessions of each split.  Errors: DataError naming file, line and column; also for
    no session, fewer than three users, or a split without any.
    """
    log = SessionLog(path, config.read)
    repeated: Counter[str] = Counter()
    sessions = without_duplicates(
        track(log, f"data ({log.format})"), config.read.duplicates, repeated
    )
    try:
        return write_splits(sessions, config, seed, out)
    finally:
        for reason, count in (log.left_out + repeated).items():
            say(f"data: left out {count}: {reason}")
        if log.bad.count:
            say(f"data: left out {log.bad.count}: wrong (--on-bad-row skip), the first of them:")
            for message in log.bad.first:
                say(f"  {message}")


def write_generated(config: SessionsConfig, seed: int, out: Path) -> Counter[str]:
    """Write generated sessions to `out/<split>.jsonl`, but for a split of none; returns the
    sessions of each split.
    """
    counts: Counter[str] = Counter()
    for name, n, sessions in generated_splits(config, seed):
        if not n:
            continue
        write_sessions(out / f"{name}.jsonl", track(sessions, f"data ({name})", n))
        counts[name] = n
    return counts


def write_splits(
    sessions: Iterable[Session], config: SessionsConfig, seed: int, out: Path
) -> Counter[str]:
    """Write each session to the file of its user's split; returns the sessions of each."""
    stream = iter(sessions)
    head = list(islice(stream, SMALL + 1))
    if not head:
        raise DataError("no session of the log was kept; the lines above say what was left out")
    users = {session.user for session in head} if len(head) <= SMALL else None
    split_of = splitter(config, seed, users)
    counts: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
    with ExitStack() as files:
        write = {name: files.enter_context(atomic_file(out / f"{name}.jsonl")) for name in SPLITS}
        for session in _drained(head, stream):
            name = split_of(session.user)
            write[name](session_line(session))
            counts[name] += 1
        empty = [name for name, count in counts.items() if not count]
        if empty:
            raise DataError(
                f"no user of the log falls to {' and '.join(empty)}; "
                f"expected more users, or larger shares (heldout {config.heldout_share}, "
                f"test {config.test_share})"
            )
    return counts


def splitter(
    config: SessionsConfig, seed: int, users: Iterable[str] | None
) -> Callable[[str], str]:
    """Which split a user's sessions go to, by a hash of the user and the seed.

    The smallest hashes are `test`, the next ones `heldout`: with `users` known exactly the
    configured shares of them and at least one, else where the hash, taken as a number in [0, 1),
    is below the shares.

    Errors: DataError with fewer than three users, or if none is left for `train`.
    """

    def place(user: str) -> float:
        return fingerprint(f"{seed}/split/{user}") / 2**64

    test, heldout = config.test_share, config.test_share + config.heldout_share
    if users is not None:
        places = sorted(map(place, users))
        if len(places) < 3:
            raise DataError(f"{len(places)} users, expected at least 3: train, held-out and test")
        n_test = max(1, round(config.test_share * len(places)))
        n_heldout = max(1, round(config.heldout_share * len(places)))
        if n_test + n_heldout >= len(places):
            raise DataError(f"no user of {len(places)} is left to train on; lower the shares")
        test, heldout = places[n_test], places[n_test + n_heldout]
    return lambda user: (
        "test" if place(user) < test else "heldout" if place(user) < heldout else "train"
    )


def _drained(head: list[Session], stream: Iterator[Session]) -> Iterator[Session]:
    """The items of the head, each freed as it is used, then the rest."""
    head.reverse()
    while head:
        yield head.pop()
    yield from stream
