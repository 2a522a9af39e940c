"""`align.transfer` between real tokenizers of three families, and against plain loops."""

import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import tppo_kernels as tk
from tppo_kernels.testing import assert_same_bits

transfer = tk.align.transfer

CORPUS = [
    "red running shoes for women", "Cheap running shoes, size 42!", "laufschuhe damen günstig",
    "café au lait recipe", "naïve bayes tutorial", "東京 駅 地図", "東京駅から京都", "run runner",
    "weather in São Paulo", "emoji 😀👍🏽 keyboard", "women's shoes & bags"]
SPECIAL = ["<s>", "</s>", "<unk>"]
FAMILIES = ("byte-level BPE", "Unigram", "WordPiece")


@functools.cache
def tokenizer(family):
    """One tokenizer of a family, trained on the corpus; it puts <s> before and </s> behind."""
    kwargs = {"special_tokens": SPECIAL, "show_progress": False}
    if family == "byte-level BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), **kwargs)
    elif family == "Unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=110, unk_token="<unk>", **kwargs)
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, **kwargs)
    made.train_from_iterator(CORPUS * 4, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", made.token_to_id("<s>")),
                                              ("</s>", made.token_to_id("</s>"))])
    return made


def offsets(family, text):
    return tokenizer(family).encode(text).offsets


def oracle(source, target, x):
    """The docstring in plain loops."""
    result = []
    for j, (start, end) in enumerate(target):
        over = [i for i, (a, b) in enumerate(source) if start < end and a <= end - 1 < b]
        first = min((source[i][1] for i in over), default=0)
        over = [i for i in over if source[i][1] == first]
        later = sum(b == end and a < b for a, b in target[j + 1:])
        pick = max(0, len(over) - 1 - later) if first == end else 0
        result.append(x[over[pick]] if over else 0)
    return result


PIECES = [*" ".join(CORPUS).split(), " ", "  ", "\n", "👩\u200d👩\u200d👧", "e\u0301", "한국"]
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join), st.text(max_size=20))


@pytest.mark.parametrize("source, target", list(itertools.product(FAMILIES, FAMILIES)))
@settings(max_examples=60, deadline=None)
@given(TEXTS)
@example("")
@example("red running shoes")
@example("Cheap  Laufschuhe, günstig 👩\u200d👩\u200d👧 東京駅!")
def test_between_real_tokenizers(source, target, text):
    """Each family against each: the loops agree; a value is that of a token on the character."""
    here, there = offsets(source, text), offsets(target, text)
    x = torch.arange(1.0, len(here) + 1)
    result = transfer(here, there, x)
    assert result.tolist() == oracle(here, there, x.tolist())
    for (start, end), value in zip(there, result.tolist(), strict=True):
        covering = [i + 1 for i, (a, b) in enumerate(here) if a < end <= b and start < end]
        assert value in covering if covering else value == 0
    back = transfer(here, here, x)
    assert back.tolist() == [v if a < b else 0 for v, (a, b) in zip(x.tolist(), here, strict=True)]


@pytest.mark.parametrize("source, target", list(itertools.permutations(FAMILIES, 2)))
@pytest.mark.parametrize("text", CORPUS)
def test_a_word_keeps_its_value_through_any_tokenizer(source, target, text):
    """Word labels on one tokenizer's tokens arrive at all tokens of the word, in both directions.

    No family cuts across a space here, so that every token lies in one word."""
    words = [m.span() for m in re.finditer(r"\S+", text)]

    def of_word(span):
        at = [k for k, (a, b) in enumerate(words, 1) if a < span[1] <= b and span[0] < span[1]]
        return at[0] if at else 0

    here, there = offsets(source, text), offsets(target, text)
    arrived = transfer(here, there, [of_word(span) for span in here]).tolist()
    arrived = [v for v, span in zip(arrived, there, strict=True) if of_word(span)]
    assert arrived == [of_word(span) for span in there if of_word(span)]
    assert set(arrived) == set(range(1, len(words) + 1))


INTERVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)).map(
    lambda t: (t[0], t[0] + t[1])), max_size=10)


@settings(max_examples=300, deadline=None)
@given(INTERVALS, INTERVALS)
def test_any_offsets(here, there):
    """Also overlapping, nested, out of order: normalizers reorder characters."""
    x = list(range(1, len(here) + 1))
    assert transfer(here, there, torch.tensor(x)).tolist() == oracle(here, there, x)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(INTERVALS, INTERVALS), min_size=1, max_size=4))
def test_a_batch_is_its_texts(batch):
    """Ragged lists, and the padded layout whose slots behind a text hold anything."""
    here, there = zip(*batch, strict=True)
    x = [torch.randn(len(h)) for h in here]
    alone = [transfer(h, t, v) for h, t, v in zip(here, there, x, strict=True)]
    assert_same_bits(tuple(transfer(here, there, x)), tuple(alone))
    S, T = max(map(len, here)), max(map(len, there))
    values = torch.full((len(batch), S + 2), math.nan)
    source = torch.zeros(len(batch), S + 2, 2, dtype=torch.int64)
    target = torch.zeros(len(batch), T, 2, dtype=torch.int64)
    for b, (h, t) in enumerate(batch):
        values[b, :len(h)] = x[b]
        source[b, :len(h)], target[b, :len(t)] = (torch.tensor(o).reshape(-1, 2) for o in (h, t))
    for padded in (transfer(here, there, values), transfer(source, target, values)):
        assert padded.shape == (len(batch), T)
        for row, expected in zip(padded, alone, strict=True):
            assert torch.equal(row[:len(expected)], expected) and not row[len(expected):].any()


def test_by_hand():
    """ "new shoes" as new| shoes against <s>|ne|w sh|oes|</s>, and back."""
    policy = [(0, 3), (3, 9)]
    reward = [(0, 0), (0, 2), (2, 6), (6, 9), (9, 9)]
    x = torch.tensor([9.0, 1.0, 2.0, 3.0, 9.0])
    assert transfer(reward, policy, x).tolist() == [2, 3]
    assert transfer(policy, reward, torch.tensor([1.0, 2.0])).tolist() == [0, 1, 2, 2, 0]
    assert transfer(reward, [(1, 1), (9, 12)], x).tolist() == [0, 0]  # no width; not covered
    assert transfer(reward, [], x).shape == (0,) and transfer([], policy, []).tolist() == [0, 0]


def test_tokens_that_share_a_character():
    """Byte-level tokens of one emoji all stand for it: the last has seen it whole."""
    source = [(0, 2), (2, 3), (2, 3), (2, 3), (3, 5)]
    x = torch.tensor([1, 2, 3, 4, 5])
    assert transfer(source, [(0, 3), (3, 5)], x).tolist() == [4, 5]
    assert transfer(source, source, x).tolist() == x.tolist()
    assert transfer([(0, 3), (3, 5)], source, x[:2]).tolist() == [1, 1, 1, 1, 2]
    assert transfer(source, [(2, 3), (2, 3)], x).tolist() == [3, 4]
    across = [(0, 2), (1, 3)]  # "a" and half of a character; its other half and "b"
    assert transfer(across, across, x[:2]).tolist() == [1, 2]
    assert transfer(across, [(0, 1), (1, 2), (2, 3)], x[:2]).tolist() == [1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64,
                                   torch.bool])
def test_kinds_and_dtypes(dtype):
    source, target = [(0, 2), (2, 5)], [(0, 3), (3, 5), (5, 5)]
    x = torch.tensor([0, 1]).to(dtype)
    out = transfer(source, target, x)
    assert out.dtype == dtype and out.tolist() == [1, 1, 0]
    for make in (tuple, np.array, torch.tensor, lambda o: torch.tensor(o).int()):
        assert torch.equal(transfer(make(source), make(target), x), out)
    if dtype != torch.bfloat16:
        array = transfer(source, target, x.numpy())
        assert isinstance(array, np.ndarray) and array.dtype == x.numpy().dtype
        (row,) = transfer([source], [target], x[None].numpy())
        assert np.array_equal(row, array) and np.array_equal(array, out.numpy())
        both = transfer([source, []], [target, target], [x.numpy(), x[:0].numpy()])
        assert all(isinstance(a, np.ndarray) for a in both) and not both[1].any()


def test_detached_and_unread_values_stay_out():
    x = torch.tensor([math.nan, 2.0, math.nan], requires_grad=True)
    out = transfer([(0, 0), (0, 2), (9, 9)], [(0, 1), (1, 2), (4, 5)], x)
    assert out.tolist() == [2, 2, 0] and not out.requires_grad


@pytest.mark.parametrize("source, target, x, error, words", [
    ([(0, 1)], [(0, 1)], [1.0, 2.0], ValueError, ["x of text 0", "[2]", "[1]", "offsets_from"]),
    ([(0, 1)], [(0, 1)], torch.ones(()), ValueError, ["x of text 0", "[]", "[1]"]),
    ([(0, 1)], [(0, 1)], None, TypeError, ["x of text 0", "None"]),
    ([(0, 1)], [(0, 1)], ["a"], TypeError, ["x of text 0", "'a'"]),
    ([(0, 1), (3, 2)], [(0, 1)], [1.0, 2.0], ValueError, ["offsets_from", "(3, 2)", "token 1"]),
    ([(0, 1)], [(-1, 1)], [1.0], ValueError, ["offsets_to", "(-1, 1)", "0 <= start <= end"]),
    ([(0, 1)], [(0, 1, 2)], [1.0], ValueError, ["offsets_to", "[1, 3]", "[tokens, 2]"]),
    ([(0.0, 1.0)], [(0, 1)], [1.0], TypeError, ["offsets_from", "float32", "whole numbers"]),
    ([None], [(0, 1)], [1.0], TypeError, ["offsets_from", "None", "(start, end)"]),
    ([(0, 1), (1,)], [(0, 1)], [1.0, 1.0], TypeError, ["offsets_from", "(1,)"]),
    ([[(0, 1)], [(0, 1)]], [[(0, 1)]], [[1.0], [1.0]], ValueError, ["2, 1 and 2 texts"]),
    ([[(0, 1)], [(0, 1)]], [[], []], [[1.0], []], ValueError, ["x of text 1", "[0]", "[1]"]),
    ([[(0, 1)] * 3], [[(0, 1)]], torch.ones(1, 2), ValueError, ["x of text 0", "[2]", "[3]"]),
])
def test_bad_input(source, target, x, error, words):
    with pytest.raises(error) as caught:
        transfer(source, target, x)
    assert all(word in str(caught.value) for word in ("transfer", *words)), caught.value
