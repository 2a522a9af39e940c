"""Rewards by a function of the user: what is paid at which token, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mapping import CORPUS, FAMILIES
from transformers import PreTrainedTokenizerFast

from tppo.errors import DataError
from tppo.models.batch import Batch
from tppo.models.tokenizer import decode
from tppo.rewards import Answers
from tppo.rewards.function import FunctionReward
from tppo.rewards.user_function import load_object

TEXTS = [
    "red running shoes\ncheap red boots",
    "👟 gift 👩‍💻 naïve cafe\u0301 🇩🇪",
    "红色连衣裙 running socks",
    "relevant queries: women's t-shirt 3.5mm",
]


def fast(family):
    tokenizer, trainer = FAMILIES[family]()
    # Emoji and half of the Chinese are outside the merges: bytes in byte-level BPE, <unk> elsewhere
    tokenizer.train_from_iterator(CORPUS[:4] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    return fast(request.param)


@pytest.fixture(scope="module")
def byte_level():
    return fast("byte-level")


def answered(tokenizer, texts, columns=None, prompts=None, ended=True):
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [[*row, tokenizer.eos_token_id] if ended else row for row in ids]
    prompts = [f"p{i}" for i in range(len(texts))] if prompts is None else prompts
    answers = Answers(prompts, ids, columns or {}, tokenizer, [tokenizer.eos_token_id],
                      list(range(len(texts))))  # fmt: skip
    return Batch([[3]] * len(texts), ids, tokenizer.pad_token_id), answers


def paid(function, batch, answers):
    return FunctionReward(function)(batch, answers).rewards


def gives(*entries):
    """A reward function that returns these entries."""

    def stated(completions):
        return list(entries)

    return stated


@pytest.mark.parametrize("ended", [True, False])
def test_a_number_is_paid_at_the_last_token(tokenizer, ended):
    batch, answers = answered(tokenizer, TEXTS, ended=ended)
    numbers = [1.5, True, np.float32(-2.0), torch.tensor(3)]
    rewards = paid(gives(*numbers), batch, answers)
    for b, number in enumerate(numbers):
        n = len(answers.response_ids[b])
        assert rewards[b, n - 1] == float(number)
        assert not rewards[b, : n - 1].any() and not rewards[b, n:].any()
    as_array = paid(lambda completions: np.array([1.5, 1, -2, 3]), batch, answers)
    assert torch.equal(as_array, rewards)


def test_a_list_has_one_number_a_token_with_the_eos(tokenizer):
    batch, answers = answered(tokenizer, TEXTS)
    lists = [[float(t) for t in range(len(ids))] for ids in answers.response_ids]
    rewards = paid(lambda completion_ids: [[float(t) for t in range(len(ids))]
                                           for ids in completion_ids], batch, answers)  # fmt: skip
    for row, wanted in zip(rewards.tolist(), lists, strict=True):
        assert row[: len(wanted)] == wanted and not any(row[len(wanted) :])
    assert torch.equal(paid(gives(*map(np.array, lists)), batch, answers), rewards)
    assert torch.equal(paid(gives(*map(torch.tensor, lists)), batch, answers), rewards)


def test_a_span_is_paid_once_at_the_last_token_that_writes_of_it(tokenizer):
    """By brute force: the token whose text, when it is added, ends at or after the span's end."""
    batch, answers = answered(tokenizer, TEXTS[:1])
    text, ids = answers.texts[0], answers.response_ids[0]
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            rewards = paid(gives([(start, end, 1.0)]), batch, answers)[0]
            (t,) = rewards.nonzero()[0].tolist()
            assert rewards[t] == 1
            before, after = (decode(tokenizer, ids[:k]) for k in (t, t + 1))
            assert len(before) < end <= len(after)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_spans_keep_their_total_and_add_up(tokenizer, data):
    text = data.draw(st.sampled_from(TEXTS) | st.text("ab 👟é红\n", min_size=1, max_size=12))
    batch, answers = answered(tokenizer, [text])
    length = len(answers.texts[0])  # an unknown character decodes to nothing
    if not length:
        return
    span = st.integers(0, length - 1).flatmap(
        lambda a: st.tuples(st.just(a), st.integers(a + 1, length), st.integers(-4, 4))
    )
    spans = data.draw(st.lists(span, max_size=5))
    covered = {i for a, b in answers.offsets[0] for i in range(a, b)}
    assert covered == set(range(length))
    rewards = paid(gives([(a, b, float(v)) for a, b, v in spans]), batch, answers)
    assert rewards.sum() == sum(v for *_, v in spans)
    assert rewards[0, -1] == 0  # the EOS writes nothing
    alone = [paid(gives([(a, b, float(v))]), batch, answers) for a, b, v in spans]
    assert torch.equal(rewards, sum(alone, torch.zeros_like(rewards)))


def test_a_character_of_several_tokens_is_paid_at_the_last_of_them(byte_level):
    batch, answers = answered(byte_level, ["a👟b"])
    bytes_of_shoe = [t for t, span in enumerate(answers.offsets[0]) if span == (1, 2)]
    assert len(bytes_of_shoe) > 1
    rewards = paid(gives([(1, 2, 2.0)]), batch, answers)[0]
    assert rewards.nonzero().flatten().tolist() == [bytes_of_shoe[-1]]


def test_the_space_that_a_token_begins_with_is_its_own(tokenizer):
    batch, answers = answered(tokenizer, ["red running shoes"])
    with_space, word = (paid(gives([(a, 11, 1.0)]), batch, answers) for a in (3, 4))
    assert torch.equal(with_space, word)


def test_functions_add_up_and_none_says_nothing(byte_level):
    batch, answers = answered(byte_level, TEXTS[:2])
    first, second = gives(1.0, None), gives(None, [(0, 2, 2.0), (0, 2, 0.5)])
    together = paid([first, second, gives(0.25, None)], batch, answers)
    assert together.sum(1).tolist() == [1.25, 2.5]
    assert FunctionReward([first, second]).totals(answers) == [1.0, 2.5]
    with pytest.raises(DataError, match=r"reward function gives\.<locals>\.stated.*entry 1 was No"):
        paid(first, batch, answers)


def test_a_function_gets_by_name_what_it_takes(byte_level):
    columns = {"targets": [["a"], ["b"]], "user": ["u", "v"]}
    batch, answers = answered(byte_level, TEXTS[:2], columns)
    seen = {}

    def every(prompts, completions, **rest):
        seen.update(rest, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    paid(every, batch, answers)
    assert seen == columns | {
        "prompts": ["p0", "p1"],
        "completions": TEXTS[:2],
        "completion_ids": answers.response_ids,
    }

    def some(completions, user, weight=2.0):
        assert (completions, user) == (TEXTS[:2], ["u", "v"])
        return [weight] * 2

    assert paid(some, batch, answers).sum() == 4
    assert paid(partial(some, weight=3.0), batch, answers).sum() == 6


def test_chats_are_answered_by_messages(byte_level):
    chat = [{"role": "user", "content": "hello"}]
    batch, answers = answered(byte_level, TEXTS[:2], prompts=[chat, "text"])

    def reward(prompts, completions):
        assert prompts == [chat, "text"]
        assert completions == [[{"role": "assistant", "content": TEXTS[0]}], TEXTS[1]]
        return [1, 2]

    assert paid(reward, batch, answers).sum() == 3


WRONG = {
    "no list": (lambda completions: 1.0, r"returned 1.0, a float, expected a list .* 2 answers"),
    "too few": (lambda completions: [1.0], "returned 1 entries, expected 2"),
    "nan": (gives(0.0, float("nan")), "entry 1: was nan, expected a finite number"),
    "too large": (gives(0.0, 1e39), r"entry 1: was 1e\+39, expected a finite number"),
    "far too large": (gives(0.0, -(10**400)), "entry 1: was inf, expected a finite number"),
    "text": (gives(0.0, "good"), "entry 1: was 'good', expected a number for the answer, a list"),
    "tuple": (gives(0.0, (0, 3, 1.0)), r"entry 1: was \(0, 3, 1.0\), expected .* a list of"),
    "a list too short": (gives(0.0, [1.0, 2.0]), "expected [0-9]+ numbers, one a token.*not 2"),
    "inf at a token": (lambda completion_ids: [[np.inf] * len(x) for x in completion_ids],
                       "entry 0, token 0: was inf, expected a finite"),
    "two numbers": (gives(0.0, [(0, 3)]), r"entry 1, item 0: was \(0, 3\), expected \(start"),
    "mixed": (gives(0.0, [(0, 3, 1.0), 2.0]), r"entry 1, item 1: was 2.0, expected \(start, end"),
    "half a character": (gives(0.0, [(0.5, 3, 1.0)]), "entry 1, item 0.*whole numbers for start"),
    "no value": (gives(0.0, [(0, 3, None)]), "entry 1, item 0.*expected a number for value"),
    "span of nan": (gives(0.0, [(0, 3, float("nan"))]), "entry 1, item 0: was nan, expected a fi"),
    "empty": (gives(0.0, [(3, 3, 1.0)]), "entry 1, item 0.*expected 0 <= start < end <= 25"),
    "backwards": (gives(0.0, [(3, 1, 1.0)]), "entry 1, item 0.*expected 0 <= start < end <= 25"),
    "before": (gives(0.0, [(-3, 1, 1.0)]), "entry 1, item 0.*expected 0 <= start < end <= 25"),
    "behind": (gives(0.0, [(0, 26, 1.0)]), "entry 1, item 0.*0 <= start < end <= 25.*'👟 gift"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_function_entry_and_text(byte_level, case):
    function, message = WRONG[case]
    batch, answers = answered(byte_level, TEXTS[:2])
    with pytest.raises(DataError, match=r"(?s)^reward function .*" + message):
        paid(function, batch, answers)


def test_an_error_inside_of_a_function_is_told_with_its_place(byte_level):
    batch, answers = answered(byte_level, TEXTS[:2])

    def broken(completions):
        return [{}["score"] for _ in completions]

    with pytest.raises(DataError, match=r"broken raised KeyError: 'score' \(.*test_function_rew"):
        paid(broken, batch, answers)


def test_parameters_are_checked_before_anything_is_paid():
    reward = FunctionReward(lambda completions, target: [])
    reward.check(["target"])
    with pytest.raises(DataError, match=r"takes 'target', .*\(targets\); did you mean 'targets'\?"):
        reward.check(["targets"])
    with pytest.raises(DataError, match="takes 'target', .*they have none"):
        reward.check([])
    with pytest.raises(DataError, match=r"takes \['texts'\] by position alone"):
        FunctionReward(eval("lambda texts, /: []"))
    with pytest.raises(DataError, match="takes nothing by position alone"):
        FunctionReward(lambda: [])
    with pytest.raises(DataError, match="reward was 3, a int, expected a function"):
        FunctionReward([3])
    with pytest.raises(DataError, match="empty list"):
        FunctionReward([])


def test_a_function_is_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    text = "class Rules:\n    @staticmethod\n    def by_length(completions): 1"
    (tmp_path / "my_words.py").write_text(text)
    (tmp_path / "needy.py").write_text("import nowhere_to_be_found")
    (tmp_path / "broken.py").write_text("def f(:")
    assert load_object("my_words:Rules.by_length").__name__ == "by_length"
    for place, message in {
        "my_words": "expected module:function",
        "my_words.py:Rules": "expected module:function: my_words:Rules",
        "./my_words:Rules": "expected module:function",
        "my_word:Rules": f"no module 'my_word', neither in {tmp_path}",
        "my_words:Rule": "has no 'Rule'; did you mean 'Rules'",
        "my_words:Rules.by_lengths": "has no 'by_lengths'; did you mean 'by_length'",
        "needy:f": "module 'needy' imports 'nowhere_to_be_found', which is not installed",
        "broken:f": "module 'broken' cannot be imported: SyntaxError",
    }.items():
        with pytest.raises(DataError, match=message.replace("?", r"\?")):
            load_object(place)
