"""Generated search sessions with latent intents: the trainer's embedded data.

A user follows one intent of a fixed library: a topic, a brand and a need.  The history shows early
queries about the topic (its words of the first steps, the need, a click on the brand) and popular
queries that have nothing to do with it; the targets are the next queries, by default three, at
least one of them a late reformulation of the intent, the others popular again.  None of them has
the words of another one in some order, which the rule would call a repetition.  The intent stands
beside the session for a judge; the targets alone are what the rule labels by.

The noise is concentrated on purpose: more than half of the target queries are one of six popular
ones, so each of them is as likely a next query as any single reformulation.  A model of the data
therefore gains nothing by sampling colder; only knowing *which words* pay does help.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tppo.labels.queries import repeats
from tppo.sessions.config import SessionsConfig
from tppo.sessions.session import Event, Session

# topic -> the words of its first steps, seen in the history and never in a target
TOPICS: dict[str, tuple[str, ...]] = {
    "backpack": ("packing", "daytrip"),
    "bicycle": ("commute", "cycling"),
    "blender": ("smoothie", "soup"),
    "camera": ("photography", "portrait"),
    "desk": ("homeoffice", "posture"),
    "headphones": ("podcast", "noise"),
    "heater": ("winter", "insulation"),
    "jacket": ("rain", "windy"),
    "lamp": ("reading", "bedroom"),
    "printer": ("labels", "scanning"),
    "stroller": ("newborn", "toddler"),
    "tent": ("camping", "festival"),
}
BRANDS = ("altara", "brenvik", "corvano", "delmora", "estrello", "fjordal", "gravio", "hestia")
NEEDS = (
    "lightweight", "foldable", "waterproof", "quiet",
    "compact", "durable", "adjustable", "rechargeable",
)  # fmt: skip
PARTS = {"topic": frozenset(TOPICS), "brand": frozenset(BRANDS), "need": frozenset(NEEDS)}
STYLES = {
    "compares prices before buying": "cheap",
    "buys for the long run": "premium",
    "prefers second hand": "used",
    "cares about the environment": "recycled",
}
EXTRAS = ("review", "price", "manual", "warranty", "stores", "repair")
# Three first words share all popular queries: colder sampling picks one of them, not an intent.
POPULAR = tuple(
    f"{first} {rest}"
    for first, rests in {
        "today": (
            "weather radar map", "football results live", "lottery numbers winner",
            "news headlines local", "horoscope gemini love",
        ),
        "free": (
            "games online puzzle", "movie streaming comedy", "music download charts",
            "ringtones classic bells", "wallpaper sunset beach",
        ),
        "where": (
            "parking downtown garage", "pharmacy open sunday", "bakery breakfast croissant",
            "cinema tickets student", "library opening hours",
        ),
    }.items()
    for rest in rests
)  # fmt: skip
EARLY_FORMS = ("{early} {topic}", "{topic} {early} tips", "{need} {early}", "{early} {need} help")
LATE_FORMS = (
    "{brand} {topic} {need} {style}",
    "{brand} {need} {style} {topic}",
    "{topic} {brand} {style} {need}",
    "{topic} {need} {brand} {extra}",
    "{need} {style} {brand} {topic}",
    "{need} {brand} {topic} {extra}",
    "{style} {topic} {need} {brand}",
    "{style} {brand} {topic} {extra}",
)
# Longer lists draw from more of everything: of the 13 reformulations and 15 popular queries above
# that are distinct as sets of words, few lists of ten could be drawn without a repetition.
MORE_EXTRAS = EXTRAS + (
    "size", "weight", "colour", "delivery", "rental", "insurance", "discount", "comparison",
    "assembly", "cleaning", "storage", "accessories", "video", "forum", "test", "guide", "outlet",
    "returns",
)  # fmt: skip
MORE_FORMS = (
    "{brand} {topic} {need} {extra}",
    "{need} {brand} {topic} {extra}",
    "{brand} {need} {style} {extra}",
    "{topic} {brand} {style} {extra}",
    "{style} {brand} {topic} {extra}",
    "{need} {style} {topic} {extra}",
    "{topic} {need} {style} {extra}",
    "{style} {topic} {need} {extra}",
)
MORE_POPULAR = tuple(
    f"{first} {query.partition(' ')[2]}"
    for first in ("today", "free", "where", "open", "new", "local")
    for query in POPULAR
)
LIBRARY_SEED = 20241100  # the library is one and the same for every run seed
INTENTS = 96
HELD_OUT_INTENTS = 16
TARGETS = 3
INTENT_TARGETS = (1, 2, 3)  # how many of three targets follow the intent ...
INTENT_TARGETS_WEIGHTS = (0.60, 0.30, 0.10)  # ... and how often: half of the targets are popular
SHORT = LATE_FORMS, EXTRAS, POPULAR
LONG = MORE_FORMS, MORE_EXTRAS, MORE_POPULAR


class Intent(NamedTuple):
    """What a user is after."""

    topic: str
    brand: str
    need: str


class SyntheticData(NamedTuple):
    """Sessions of four disjoint sets of users."""

    train: list[Session]
    heldout: list[Session]  # early stop of SFT, keep-best of PPO
    test: list[Session]  # intents seen in training, users unseen
    transfer: list[Session]  # intents never seen in training


def intent_library() -> tuple[list[Intent], list[Intent]]:
    """The intents of training and those held out, the same for every seed."""
    rng = random.Random(LIBRARY_SEED)
    every = [Intent(topic, brand, need) for topic in TOPICS for brand in BRANDS for need in NEEDS]
    chosen = rng.sample(every, INTENTS)
    return chosen[HELD_OUT_INTENTS:], chosen[:HELD_OUT_INTENTS]


def generate_sessions(config: SessionsConfig, seed: int) -> SyntheticData:
    """Sessions of fresh users, a function of `config` and `seed` alone."""
    return SyntheticData(*(list(sessions) for _, _, sessions in generated_splits(config, seed)))


def generated_splits(
    config: SessionsConfig, seed: int
) -> Iterator[tuple[str, int, Iterator[Session]]]:
    """(name, size, sessions one at a time) of each split of `generate_sessions`."""
    known, unknown = intent_library()
    sizes = (
        ("train", config.train_users, known),
        ("heldout", config.heldout_users, known),
        ("test", config.test_users, known),
        ("transfer", config.transfer_users, unknown),
    )
    for name, n, intents in sizes:
        yield name, n, _split(name, n, seed, intents, config.queries)


def _split(
    name: str, n: int, seed: int, intents: Sequence[Intent], queries: int
) -> Iterator[Session]:
    # A string seeds Python's generator by its SHA-512: the same under any PYTHONHASHSEED.
    rng = random.Random(f"{seed}/{name}")
    for i in range(n):
        yield _session(f"{name}-{i}", rng, rng.choice(intents), queries)


def _session(user: str, rng: random.Random, intent: Intent, queries: int) -> Session:
    habit, style = rng.choice(list(STYLES.items()))
    early = rng.choice(TOPICS[intent.topic])
    words = {"early": early, "style": style, **intent._asdict()}

    # One search names the topic and one the need, or nobody could know them.
    searches = [rng.choice(EARLY_FORMS[:2]), rng.choice(EARLY_FORMS[2:])]
    rng.shuffle(searches)
    history = [Event("search", form.format(**words), clicks=rng.randint(0, 3)) for form in searches]
    history.insert(rng.randint(1, len(history)), Event("click", intent.brand))
    for query in rng.sample(POPULAR, rng.randint(0, 1)):
        history.insert(rng.randint(0, len(history)), Event("search", query, clicks=1))

    of_three = rng.choices(INTENT_TARGETS, INTENT_TARGETS_WEIGHTS)[0]
    n_intent = max(1, round(of_three * queries / TARGETS))
    forms, extras, popular = SHORT if queries <= TARGETS else LONG
    targets = _late_queries(rng, n_intent, words, forms, extras)
    targets += rng.sample(popular, queries - n_intent)
    rng.shuffle(targets)
    return Session(
        id=user, user=user, source="generated", profile=(habit,),
        history=tuple(history), targets=tuple(targets), intent=tuple(intent._asdict().items()),
    )  # fmt: skip


def _late_queries(
    rng: random.Random,
    n: int,
    words: dict[str, str],
    known: Sequence[str],
    extras: Sequence[str],
) -> list[str]:
    """Reformulations of an intent, none of which has the words of another in some order."""
    if n > TARGETS:  # so many are seldom distinct when they are drawn at once
        found: list[str] = []
        while len(found) < n:
            query = rng.choice(known).format(extra=rng.choice(extras), **words)
            if not any(repeats([*found, query])):
                found.append(query)
        return found
    while True:
        forms = rng.sample(known, n)
        queries = [form.format(extra=rng.choice(extras), **words) for form in forms]
        if not any(repeats(queries)):
            return queries
