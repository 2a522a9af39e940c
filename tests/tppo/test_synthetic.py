"""Generated sessions: what their design promises, and that only the seed decides them."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from tppo.labels.queries import repeats
from tppo.sessions.config import SessionsConfig
from tppo.sessions.session import read_sessions, write_sessions
from tppo.sessions.synthetic import MORE_POPULAR, POPULAR, generate_sessions, intent_library

CONFIG = SessionsConfig(train_users=3000, heldout_users=100, test_users=100, transfer_users=100)


@pytest.fixture(scope="module")
def data():
    return generate_sessions(CONFIG, 0)


def test_the_hash_seed_of_python_does_not_matter():
    code = (
        "import hashlib; from tppo.sessions.config import SessionsConfig;"
        "from tppo.sessions.synthetic import generate_sessions;"
        "data = generate_sessions(SessionsConfig(50, 9, 9, 9), 3);"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())"
    )
    here = hashlib.sha256(
        repr(generate_sessions(SessionsConfig(50, 9, 9, 9), 3)).encode()
    ).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert out.stdout.strip() == here, out.stderr


def test_the_seed_matters_and_the_library_does_not_follow_it(data):
    assert generate_sessions(CONFIG, 1).train != data.train
    known, unknown = intent_library()
    assert not set(known) & set(unknown)


def test_users_are_disjoint_and_files_round_trip(data, tmp_path):
    users = [session.user for split in data for session in split]
    assert len(users) == len(set(users))
    write_sessions(tmp_path / "test.jsonl", data.test)
    assert read_sessions(tmp_path / "test.jsonl") == data.test


def test_a_few_thousand_distinct_queries():
    queries = {
        text
        for session in generate_sessions(SessionsConfig(), 0).train
        for text in (*session.targets, *(event.text for event in session.history))
    }
    assert 2000 < len(queries) < 10_000


def test_half_of_the_targets_are_popular_and_every_user_has_an_intent(data):
    popular = [sum(target in POPULAR for target in session.targets) for session in data.train]
    assert max(popular) == 2  # at least one of three follows the intent
    assert 0.45 < sum(popular) / (3 * len(popular)) < 0.55


@pytest.mark.parametrize("queries", (1, 3, 10, 12))
def test_an_answer_may_have_any_number_of_distinct_queries_half_of_them_popular(queries):
    sessions = generate_sessions(SessionsConfig(400, 1, 1, 1, queries), 0).train
    assert {len(session.targets) for session in sessions} == {queries}
    assert not any(any(repeats(session.targets)) for session in sessions)
    known = POPULAR if queries <= 3 else MORE_POPULAR
    popular = [sum(target in known for target in session.targets) for session in sessions]
    assert max(popular) < queries  # at least one follows the intent
    if queries > 1:
        assert 0.4 < sum(popular) / (queries * len(sessions)) < 0.6


def test_no_first_word_of_the_intent_is_likelier_than_that_of_a_popular_query(data):
    """Else colder sampling would find the intent by itself."""
    first = Counter(target.split()[0] for session in data.train for target in session.targets)
    popular = {query.split()[0] for query in POPULAR}
    assert {word for word, _ in first.most_common(len(popular))} == popular


def test_what_the_targets_need_stands_in_the_history(data):
    """All words of an intent's targets but the extras and the style can be read off the history."""
    known, unknown = intent_library()
    words = {word for intent in (*known, *unknown) for word in intent}
    for session in (*data.train[:300], *data.transfer):
        seen = {word for event in session.history for word in event.text.split()}
        wanted = {word for target in session.targets for word in target.split()} & words
        assert wanted <= seen
