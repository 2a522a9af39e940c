"""The integration with TRL where TRL is not: what it says, and how rewards reach tokens.

tests/interop holds it against TRL itself.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tppo_kernels.integrations._peer import PeerError
from tppo_kernels.integrations._token_rewards import TokenRewards


def load():
    sys.modules.pop("tppo_kernels.integrations.trl", None)
    importlib.import_module("tppo_kernels.integrations.trl")


def test_without_trl_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(PeerError, match=r"^trl is not installed, expected trl>=1\.12,<1\.17: pip "
                                        r"install 'trl>=1\.12,<1\.17'$"):
        load()


@pytest.mark.parametrize("version", ["1.11.0", "1.17.0", "0.24.0"])
def test_another_trl_is_one_sentence(monkeypatch, version):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None:
                        importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(PeerError, match=rf"^trl {version} is installed, expected trl>=1\.12,<1"):
        load()


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level pieces "go", "od", " dog" and single bytes: "é" is two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["</s>", *alphabet, "go", "od", "Ġd", "og", "Ġdog"])}
    whole = Tokenizer(models.BPE(vocab=words, merges=[("g", "o"), ("o", "d"), ("Ġ", "d"),
                                                      ("o", "g"), ("Ġd", "og")]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>")


@pytest.fixture
def paid(tokenizer):
    """The rewards of one answer "good dog": tokens "go", "od", " dog", the EOS."""
    ids = tokenizer.convert_tokens_to_ids(["go", "od", "Ġdog", "</s>"])

    def pay(entry, text="good dog", ids=ids):
        rewards = TokenRewards("f", tokenizer)
        return rewards.totals([entry], [text], [ids]), rewards.tokens

    return pay


@pytest.mark.parametrize("entry", [2, 2.0, True, np.float32(2), torch.tensor(2.0)])
def test_a_number_is_of_the_whole_answer(paid, entry):
    assert paid(entry) == ([float(entry)], [None])


def test_nothing_to_say_is_none(paid):
    assert paid(None) == ([None], [None])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_number_a_token_stays_at_its_token(paid, kind):
    assert paid(kind([0.5, -1.0, 0.0, 2.0])) == ([1.5], [[0.5, -1.0, 0.0, 2.0]])


@pytest.mark.parametrize(("spans", "expected"), [
    ([(0, 1, 1.0)], [1.0, 0, 0, 0]),  # "g" is written by "go"
    ([(0, 8, 1.0)], [0, 0, 1.0, 0]),  # the last token that writes a part of it
    ([[0, 3, 1.0], (2, 4, 0.5)], [0, 1.5, 0, 0]),
    ([], [0, 0, 0, 0]),
])
def test_a_span_is_paid_at_its_last_writer(paid, spans, expected):
    assert paid(spans)[1] == [expected]


def test_a_character_of_several_tokens_is_paid_at_its_last(tokenizer):
    ids = tokenizer("é!")["input_ids"]
    assert len(ids) == 3
    rewards = TokenRewards("f", tokenizer)
    assert rewards.totals([[(0, 1, 2.0)]], ["é!"], [ids]) == [2.0]
    assert rewards.tokens == [[0, 2.0, 0]]


@pytest.mark.parametrize(("text", "span", "paid_at"), [
    ("go😀od", (2, 3), 4),  # four bytes, one character: at the last of its tokens
    ("go😀od", (3, 5), 5),  # what stands behind it is not shifted
    ("e\u0301 dog", (0, 1), 0),  # a letter and its accent are two characters
    ("e\u0301 dog", (1, 2), 2),
    ("日本", (1, 2), 5), ("dog", (1, 3), 1),
])
def test_spans_count_characters_and_not_bytes(tokenizer, text, span, paid_at):
    ids = tokenizer(text)["input_ids"]
    rewards = TokenRewards("f", tokenizer)
    assert rewards.totals([[(*span, 2.0)]], [text], [ids]) == [2.0]
    assert rewards.tokens == [[2.0 * (t == paid_at) for t in range(len(ids))]]


def test_half_a_character_and_a_special_token_keep_the_places_of_the_others(tokenizer):
    """Sampled ids need not spell a text: TRL shows the function what they decode to."""
    half, whole, mark = (tokenizer(text)["input_ids"] for text in ("é", "good", "!"))
    ids = [half[0], *whole, tokenizer.eos_token_id, *mark]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text == "\ufffdgood!"
    rewards = TokenRewards("f", tokenizer)
    rewards.totals([[(0, 1, 1.0), (3, 4, 2.0), (5, 6, 4.0)]], [text], [ids])
    assert rewards.tokens == [[1.0, 0.0, 2.0, 0.0, 4.0]]


def test_an_answer_without_tokens_is_paid_nothing_or_a_number(tokenizer):
    rewards = TokenRewards("f", tokenizer)
    assert rewards.totals([[], None, 3], ["", "", ""], [[], [], []]) == [0.0, None, 3.0]
    assert rewards.tokens == [[], None, None]
    with pytest.raises(ValueError, match="entry 0, item 0 was .*expected 0 <= start < end <= 0"):
        rewards.totals([[(0, 1, 1.0)]], [""], [[]])


def test_a_chat_that_was_stripped_keeps_its_characters(paid, tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["Ġdog", "Ġdog", "</s>"])  # " dog dog"
    text = [{"role": "assistant", "content": "dog dog"}]
    assert paid([(0, 3, 1.0)], text, ids)[1] == [[1.0, 0, 0]]
    assert paid([(3, 7, 1.0)], text, ids)[1] == [[0, 1.0, 0]]


@pytest.mark.parametrize(("entry", "words"), [
    ([1.0, 2.0], "f: entry 0 was .*expected 4 numbers, one a token"),
    ([(0, 9, 1.0)], r"entry 0, item 0 was \(0, 9, 1.0\).*expected 0 <= start < end <= 8"),
    ([(0, 1.5, 1.0)], "expected whole numbers for start and end"),
    ([(-1, 2, 1.0)], "expected 0 <= start < end <= 8"),
    ([(3, 3, 1.0)], "expected 0 <= start < end"), ([(5, 2, 1.0)], "expected 0 <= start < end"),
    ([(0, 1, None)], r"item 0 was None.*a number"),
    ([(0, 1, 1.0), 2.0], r"item 1 was 2\.0.*expected \(start, end, value\)"),
    ((0.5, 1.0, 0.0, 2.0), "a tuple, expected a number, a list with one number a token"),
    ([(0, 1)], r"expected \(start, end, value\)"),
    ([(0, 1, float("nan"))], "expected a finite number"),
    ([float("inf"), 0, 0, 0], "entry 0, token 0 was inf.*expected a finite number"),
    ("good", "'good', a str, expected a number, a list with one number a token"),
    ({"a": 1}, "a dict, expected a number"),
])
def test_what_is_none_of_these_is_an_error_that_names_it(paid, entry, words):
    with pytest.raises(ValueError, match=words):
        paid(entry)


def test_a_text_that_its_tokens_do_not_write_has_no_spans(paid):
    with pytest.raises(ValueError, match="expected a text that is what the tokens"):
        paid([(0, 1, 1.0)], "something else")


@pytest.mark.parametrize(("found", "words"), [
    (None, "f returned None.*expected a list with one entry"), ([1.0, 2.0], "returned 2 entries"),
])
def test_a_function_gives_one_entry_an_answer(tokenizer, found, words):
    with pytest.raises(ValueError, match=words):
        TokenRewards("f", tokenizer).totals(found, ["good"], [[1, 2]])
