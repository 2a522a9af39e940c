"""Word labels to token categories, on real tokenizers of the three families, trained here."""

import random
import unicodedata
from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tppo.labels.words import fold, map_labels, word_spans
from tppo.models.tokenizer import decode, token_offsets
from tppo_kernels.models import align

CORPUS = [
    "red running shoes, cheap red boots",
    "relevant queries: women's t-shirt 3.5mm café crème",
    "running socks for flat feet and red wallets",
    "bluetooth headphones under 1,000 dollars",
    "红色连衣裙 连衣裙 运动鞋 上海海鲜",
    "👟 👩‍💻 gift 🇩🇪 naïve cafe\u0301",
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    return tokenizer, trainer


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    return tokenizer, trainer


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        show_progress=False,
    )
    return tokenizer, trainer


FAMILIES = {"byte-level": byte_level, "metaspace": metaspace, "word-piece": word_piece}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request):
    tokenizer, trainer = FAMILIES[request.param]()
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


def encode(tokenizer, text):
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return [tuple(offset) for offset in encoding["offset_mapping"]]


def expected(text, labelled, offsets):
    """The category by brute force, for labels given as [start, end) -> 0 or 1."""
    out = []
    for start, end in offsets:
        inside = [
            label + 1 for (a, b), label in labelled.items() for i in range(start, end) if a <= i < b
        ]
        out.append(max(reversed(inside), key=inside.count, default=0))
    return out


def spans_of(text, *words):
    """The span of each word, one after the other."""
    spans, at = [], 0
    for word in words:
        at = text.index(word, at)
        spans.append((at, at + len(word)))
        at += len(word)
    return spans


# text, the words as the labeller wrote them, their labels, the words as they stand in the text
CASES = {
    "plain": ("red running shoes", ["red", "running", "shoes"], [1, 0, 1], None),
    "leading space and line break": (" red\nboots", ["red", "boots"], [1, 0], None),
    "repeated word": ("red boots\nred socks", ["red", "boots", "red", "socks"], [1, 0, 0, 1], None),
    "glued punctuation": (
        'cheap "red" boots, (running) shoes!',
        ["cheap", "red", "boots", "running", "shoes"],
        [0, 1, 1, 0, 1],
        None,
    ),
    "punctuation in the label": ("red boots, socks", ["red", "boots,", "socks."], [0, 1, 0],
                                 ["red", "boots", "socks"]),
    "case": ("RED Running shoes", ["red", "running", "SHOES"], [1, 0, 1],
             ["RED", "Running", "shoes"]),
    "inner punctuation": (
        "women's t-shirt 3.5mm 1,000",
        ["women\u2019s", "t-shirt", "3.5mm", "1,000"],
        [1, 0, 1, 0],
        ["women's", "t-shirt", "3.5mm", "1,000"],
    ),
    "accents composed": ("café crème now", ["cafe\u0301", "crème", "now"], [1, 0, 1],
                         ["café", "crème", "now"]),
    "accents apart": ("cafe\u0301 cre\u0300me now", ["café", "crème", "now"], [1, 0, 1],
                      ["cafe\u0301", "cre\u0300me", "now"]),
    "emoji": ("👟 red 👩‍💻 gift 🇩🇪", ["👟", "red", "👩‍💻", "gift", "🇩🇪"], [1, 0, 1, 0, 1], None),
    "emoji glued": ("boots👟👗 ❤️red", ["boots", "👟", "👗", "❤", "red"],
                    [0, 1, 0, 1, 0], ["boots", "👟", "👗", "❤️", "red"]),
    "Chinese in words of the labeller": (
        "红色连衣裙运动鞋", ["红色", "连衣裙", "运动鞋"], [0, 1, 0], None),
    "Chinese beside Latin": ("nike运动鞋 红色", ["nike", "运动鞋", "红色"], [1, 0, 1], None),
    "Japanese": (
        "赤いスニーカーとバッグ", ["赤い", "スニーカー", "と", "バッグ"], [1, 0, 0, 1], None),
    "Thai": ("รองเท้าสีแดง", ["รองเท้า", "สีแดง"], [0, 1], None),
    "sharp s": ("Straße und STRASSE", ["strasse", "und", "straße"], [1, 0, 0],
                ["Straße", "und", "STRASSE"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_token_takes_the_category_of_its_word(tokenizer, case):
    text, words, labels, written = CASES[case]
    offsets = encode(tokenizer, text)
    labelled = dict(zip(spans_of(text, *(written or words)), labels, strict=True))
    got = map_labels(text, list(zip(words, labels, strict=True)), offsets)
    assert got == expected(text, labelled, offsets)
    # Character by character too: independent of what the tokenizer merged.
    each = [(i, i + 1) for i in range(len(text))]
    assert map_labels(text, list(zip(words, labels, strict=True)), each) == expected(
        text, labelled, each
    )


def test_sub_tokens_copy_and_special_tokens_get_none(tokenizer):
    text = "relevant wallets, relevant"
    offsets = [(0, 0), *encode(tokenizer, text), (0, 0), (len(text), len(text))]
    got = map_labels(text, [("relevant", 1), ("wallets", 0)], offsets)
    assert got[0] == got[-1] == got[-2] == 0
    inner = dict(zip(offsets[1:-2], got[1:-2], strict=True))
    assert len([c for (s, _), c in inner.items() if s < 8 and c == 2]) >= 1
    assert {c for (s, e), c in inner.items() if 8 < s and e <= 16} == {1}
    assert {c for (s, e), c in inner.items() if s >= 18} == {2}
    assert {c for (s, e), c in inner.items() if text[s:e].strip() == ","} == {0}


def test_a_word_split_by_added_and_special_tokens(tokenizer):
    """`tooth` becomes a token of its own inside `bluetooth`; `<sep>` stands inside `running`."""
    tokenizer.add_tokens(["tooth"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    text = "bluetooth red run<sep>ning shoes"
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    offsets = [tuple(offset) for offset in encoding["offset_mapping"]]
    separator = tokenizer.convert_tokens_to_ids("<sep>")
    special = [token == separator for token in encoding["input_ids"]]
    assert sum(special) == 1 and any(text[s:e].strip() == "tooth" for s, e in offsets)
    words = [("bluetooth", 1), ("red", 0), ("running", 1), ("shoes", 0)]
    labelled = {(0, 9): 1, (10, 13): 0, (14, 17): 1, (22, 26): 1, (27, 32): 0}
    want = expected(text, labelled, offsets)
    assert map_labels(text, words, offsets, special) == want
    assert want[special.index(True)] == 0
    with pytest.raises(ValueError, match="no word 'running'"):
        map_labels(text, words, offsets)


def test_bytes_of_one_character_share_its_category():
    """A character outside the merges comes as several tokens with one character's offsets."""
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator(["red boots"], trainer)
    text = "red 🧦 鞋"
    offsets = tokenizer.encode(text).offsets
    assert offsets.count((4, 5)) >= 3 or offsets.count((3, 5)) >= 1
    got = map_labels(text, [("red", 0), ("🧦", 1), ("鞋", 0)], offsets)
    for (start, end), category in zip(offsets, got, strict=True):
        if start <= 4 < end:
            assert category == 2
        if end == len(text) and start >= 6:
            assert category == 1


def test_byte_fallback_tokens_share_their_character():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    encoding = tokenizer.encode("a鞋a")
    assert encoding.tokens == ["a", "<0xE9>", "<0x9E>", "<0x8B>", "a"]
    got = map_labels("a鞋a", [("a", 0), ("鞋", 1)], encoding.offsets)
    assert got == [1, 2, 2, 2, 1], encoding.offsets


RED = "red shoes, red boots\nRED hat"
RED_AT = [(0, 3), (11, 14), (21, 24)]


def test_a_word_listed_once_is_labelled_at_each_occurrence():
    assert map_labels(RED, [("red", 1)], RED_AT) == [2, 2, 2]
    assert map_labels(RED, [("hat", 0), ("red", 1)], RED_AT) == [2, 2, 2]  # in another order


def test_labels_that_differ_go_to_the_occurrences_in_order():
    words = [("red", 1), ("red", 0), ("red", 1)]
    assert map_labels(RED, words, RED_AT) == [2, 1, 2]
    # The words between tell which occurrence is meant, and nothing is left over.
    words = [("red", 1), ("shoes", 1), ("red", 0), ("boots", 1), ("red", 1), ("hat", 1)]
    assert map_labels(RED, words, RED_AT) == [2, 1, 2]
    words = [("hat", 1), ("boots", 0), ("red", 1), ("red", 0), ("red", 1), ("shoes", 1)]
    assert map_labels(RED, words, RED_AT) == [2, 1, 2]


@pytest.mark.parametrize("labels", [(1, 0), (1, 0, 1, 0)])
def test_labels_that_differ_and_do_not_count_out_are_refused(labels):
    with pytest.raises(ValueError, match=r"word 'red' is listed \d times .* occurs 3 times"):
        map_labels(RED, [("red", label) for label in labels], RED_AT)


@pytest.mark.parametrize("word", ["blue", "shoe", "ed", "red socks", "🧦", "re", "hatred"])
def test_a_word_that_the_response_does_not_have_is_named(word):
    with pytest.raises(ValueError) as error:
        map_labels(RED, [("red", 1), (word, 1)], [])
    assert repr(word) in str(error.value) and repr(RED) in str(error.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [("don't", "t"), ("3.5mm", "5mm"), ("1,000", "000"), ("cafe\u0301", "cafe"), ("c++", "c")],
)
def test_a_piece_of_a_word_is_no_word(text, word):
    with pytest.raises(ValueError, match="no word"):
        map_labels(text, [(word, 1)], [])


def test_half_an_emoji_is_no_word():
    with pytest.raises(ValueError, match="no word"):
        map_labels("👩‍💻", [("👩", 1)], [])
    with pytest.raises(ValueError, match="no word"):
        map_labels("🇩🇪", [("🇩", 1)], [])
    with pytest.raises(ValueError, match="no word"):
        map_labels("Straße", [("stras", 1)], [])
    flags = [(0, 2), (2, 4), (1, 3)]
    assert map_labels("🇩🇪🇫🇷", [("🇩🇪", 1), ("🇫🇷", 0)], flags) == [2, 1, 1]


def test_words_without_spaces_between_them_in_any_order():
    each = [(i, i + 1) for i in range(4)]
    assert map_labels("海鲜上海", [("上海", 1), ("海鲜", 0)], each) == [1, 1, 2, 2]
    assert map_labels("海海上海", [("海", 1), ("上", 0)], each) == [2, 2, 1, 2]


def test_parts_of_a_compound_are_words_only_where_the_labeller_split_it():
    text, offsets = "t-shirt t", [(0, 1), (1, 2), (2, 7), (8, 9)]
    assert map_labels(text, [("t", 1)], offsets) == [0, 0, 0, 2]
    assert map_labels(text, [("t-shirt", 0), ("t", 1)], offsets) == [1, 1, 1, 2]
    assert map_labels(text, [("t", 0), ("shirt", 1), ("t", 1)], offsets) == [1, 0, 2, 2]
    assert map_labels("t-shirt", [("shirt", 1)], offsets[:3]) == [0, 0, 2]


def test_the_longer_word_goes_first():
    text = "york, new york"
    offsets = [(0, 4), (6, 9), (10, 14)]
    assert map_labels(text, [("york", 0), ("new york", 1)], offsets) == [1, 2, 2]
    assert map_labels(text, [("new york", 1), ("york", 0)], offsets) == [1, 2, 2]
    assert map_labels("海上海", [("上海", 1), ("海", 0)], [(0, 1), (1, 2), (2, 3)]) == [1, 2, 2]


def test_a_token_over_several_words_takes_the_larger_share():
    words = [("ab", 0), ("cde", 1), ("fgh", 0)]
    text = "ab cde fgh"
    assert map_labels(text, words, [(0, 6)]) == [2]
    assert map_labels(text, words, [(3, 10)]) == [1]  # a tie: the last
    assert map_labels(text, words, [(2, 3)]) == [0]


def test_punctuation_that_was_labelled_as_a_word_is_passed_over():
    assert map_labels("a , b", [("a", 1), (",", 0), ("b", 1)], [(0, 1), (2, 3), (4, 5)]) == [
        2,
        0,
        2,
    ]


def test_empty_input():
    assert map_labels("", [], []) == []
    assert map_labels("", [], [(0, 0)]) == [0]
    assert map_labels("red", [], [(0, 3)]) == [0]
    assert word_spans("") == word_spans(" ,. \n") == []
    with pytest.raises(ValueError, match="no word 'red' in the response ''"):
        map_labels("", [("red", 1)], [])


def test_labels_and_offsets_out_of_range_are_named():
    with pytest.raises(ValueError, match="label of word 'red' was 2, expected 0 or 1"):
        map_labels("red", [("red", 2)], [])
    for offset in ((0, 4), (2, 1), (-1, 2)):
        with pytest.raises(ValueError, match=r"offset was \(.*expected 0 <= start <= end <= 3"):
            map_labels("red", [("red", 1)], [offset])


WORDS = {
    "red shoes, blue": ["red", "shoes", "blue"],
    "t-shirt don't 3.5 1,000 10:30": ["t-shirt", "don't", "3.5", "1,000", "10:30"],
    "c++ $20": ["c++", "$20"],
    "a,b;c|d (e) \"f\" g...h -i- u.s.": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "u.s"],
    "cafe\u0301 naïve": ["cafe\u0301", "naïve"],
    "👟red 👩‍💻 1️⃣ 🏴\U000e0067\U000e007f": ["👟", "red", "👩‍💻", "1️⃣", "🏴\U000e0067\U000e007f"],
    "東京ホテル，iphone手机。 靴": ["東京", "ホテル", "iphone", "手机", "靴"],
    "ร้านกาแฟ 𠮷野家2\ud800東京": ["ร้าน", "กาแฟ", "𠮷", "野家", "2", "東京"],
    "हिन्दी में": ["हिन्दी", "में"],
    "\ufeffred\u200bboots": ["red", "boots"],
}  # fmt: skip


@pytest.mark.parametrize("text", WORDS)
def test_words_of_a_text(text):
    assert [text[start:end] for start, end in word_spans(text)] == WORDS[text]


ALPHABET = (
    "abA1.,'’-/ \n\t\"()"
    + "éße\u0301σς鞋连ラ👟🏽\u200d❤\ufe0f🇩🇪1\u20e3ßİ각ᄀ\u1161\u200b\u00ad\u200c्क"
)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(ALPHABET), max_size=24) | st.text(max_size=12), st.integers(0, 99))
@example("İ i\u0307", 1)
@example("11\u20e3", 1)
def test_words_listed_in_order_label_exactly_their_characters(text, seed):
    """What the rule labeller does, on any text: each span gets its own label and nothing else."""
    spans = word_spans(text)
    draw = random.Random(seed)
    labels = [draw.randrange(2) for _ in spans]
    each = [(i, i + 1) for i in range(len(text))]
    words = [(text[start:end], label) for (start, end), label in zip(spans, labels, strict=True)]
    got = map_labels(text, words, each)
    labelled = dict(zip(spans, labels, strict=True))
    blank = [i for i in range(len(text)) if not any(a <= i < b for a, b in spans)]
    assert got == expected(text, labelled, each)
    assert all(got[i] == 0 for i in blank)


@settings(max_examples=150, deadline=None)
@given(st.text(st.sampled_from(ALPHABET), max_size=24))
def test_spans_are_ordered_and_folding_forgets_unicode_form_and_case(text):
    spans = word_spans(text)
    flat = [position for span in spans for position in span]
    assert flat == sorted(flat) and all(start < end for start, end in spans)
    for form in ("NFC", "NFD"):
        assert fold(unicodedata.normalize(form, text)) == fold(text)
    assert fold(" ".join(text[start:end] for start, end in spans)).split() == [
        fold(text[start:end]) for start, end in spans
    ]


@pytest.mark.parametrize("case", CASES)
def test_sampled_ids_need_not_be_those_of_the_text(case):
    """A policy may spell an answer byte by byte; each byte takes its character's category."""
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator([], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    text, words, labels, _ = CASES[case]
    ids = [*tokenizer.encode(text).ids, fast.eos_token_id]
    assert len(ids) == len(text.encode()) + 1
    decoded, offsets = token_offsets(fast, ids)
    labelled = list(zip(words, labels, strict=True))
    each = map_labels(text, labelled, [(i, i + 1) for i in range(len(text))])
    want = [category for c, category in zip(text, each, strict=True) for _ in c.encode()] + [0]
    assert decoded == text
    assert map_labels(decoded, labelled, offsets) == want


def byte_fallback():
    """As Llama 2's: SentencePiece's spaces, characters outside the vocabulary byte by byte."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    merges = [("\u2581", "r"), ("e", "d"), ("\u2581r", "ed")]
    for letter in "\u2581abdegnorstu,.":
        vocabulary.setdefault(letter, len(vocabulary))
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return tokenizer


@pytest.fixture(scope="module", params=[*FAMILIES, "byte-fallback", "bpe-with-suffix"])
def sampler(request):
    """A tokenizer whose ids are sampled one by one, special and unknown ones among them."""
    if request.param == "byte-fallback":
        tokenizer = byte_fallback()
    elif request.param == "bpe-with-suffix":
        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.BPEDecoder("</w>")
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<pad>", "<s>", "</s>"], end_of_word_suffix="</w>",
            show_progress=False,
        )  # fmt: skip
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        tokenizer, trainer = FAMILIES[request.param]()
        tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


def spans_by_prefixes(tokenizer, ids):
    """The slow definition, for ids that decode to whole characters."""
    text, spans, start = decode(tokenizer, ids), [], 0
    for i in range(len(ids)):
        prefix = decode(tokenizer, ids[: i + 1])
        same = next((k for k, c in enumerate(prefix) if text[k : k + 1] != c), len(prefix))
        end = same + (same < len(prefix) or prefix.endswith("\ufffd"))
        spans.append((start, end))
        start = same
    return text, spans


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**6), max_size=30))
def test_spans_of_sampled_ids_are_those_of_the_slow_definition(sampler, draws):
    tokens = [t for t in range(len(sampler)) if "\ufffd" not in decode(sampler, [t])]
    ids = [tokens[draw % len(tokens)] for draw in draws]
    text, spans = token_offsets(sampler, ids)
    slow_text, slow = spans_by_prefixes(sampler, ids)
    assert text == slow_text
    if sampler.backend_tokenizer.decoder.__class__ is not decoders.BPEDecoder:
        assert spans == slow
    assert all(text[a:b].strip() == text[c:d].strip()
               for (a, b), (c, d) in zip(spans, slow, strict=True))  # fmt: skip


def test_a_space_that_only_a_first_word_would_have_is_no_character():
    """Found by the property above: the decoder strips it, so its byte token shows nothing."""
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), eos_token="</s>")
    ids = fast.convert_tokens_to_ids(["<0x20>", "<unk>", "<0x20>", "\u2581red"])
    assert token_offsets(fast, ids) == ("<unk>  red", [(0, 0), (0, 5), (5, 6), (6, 10)])


@pytest.mark.parametrize("case", CASES)
def test_spans_are_the_offsets_of_the_tokenizer(sampler, case):
    """Where decoding gives back the text, its own ids have the offsets that it says itself."""
    encoding = sampler(CASES[case][0], return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    text, spans = token_offsets(sampler, ids)
    if text != CASES[case][0]:
        return
    for (start, end), (a, b) in zip(spans, offsets, strict=True):
        if start < end:  # "\u2581" before the first word says that it has that word's first letter
            assert text[start:end].strip() == text[a:b].strip()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("a\ufffd鞋👟é".encode()) | st.integers(0, 255)))
@example([*"👟".encode(), 0xE9, 0x9E, 0x61])
@example([0x61, *"鞋鞋\ufffd".encode(), 0x62])
def test_spans_of_bytes_that_may_be_no_text(draws):
    """Sampled bytes: every character stands in the span of its tokens, in order, all of it."""
    draws = bytes(draws).removeprefix(b" ")  # the space before a first word is not shown
    for tokenizer, name in ((byte_tokenizer(), BYTES.__getitem__), (byte_fallback(), BYTE_NAME)):
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        ids = [fast.convert_tokens_to_ids(name(byte)) for byte in draws]
        text, spans = token_offsets(fast, ids)
        assert len(spans) == len(ids) and all(end == start + 1 for start, end in spans)
        assert spans == sorted(spans) and {i for i, _ in spans} == set(range(len(text)))
        if "\ufffd" not in text:
            assert spans == [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]


BYTES = bytes_to_unicode()
BYTE_NAME = "<0x{:02X}>".format


@lru_cache
def byte_tokenizer():
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


def test_offsets_take_one_decoding_however_long_the_answer(sampler, monkeypatch):
    ids = [*range(len(sampler))] * 2
    token_offsets(sampler, ids)
    calls = []

    def counted(tokenizer, ids):
        calls.append(len(ids))
        return decode(tokenizer, ids)

    monkeypatch.setattr(align, "decode", counted)
    token_offsets(sampler, ids * 3)
    assert calls == [len(ids) * 3] or "suffix" in str(sampler.backend_tokenizer.decoder)


def test_a_word_that_was_not_judged_has_a_category_of_its_own():
    words = [("red", 1), ("shoes", -1), ("red", 0), ("boots", -1), ("red", -1), ("hat", 1)]
    assert map_labels(RED, words, RED_AT) == [2, 1, -1]
    # A token over two words takes the category of the one that was judged.
    assert map_labels("red hat", [("red", -1), ("hat", 1)], [(0, 7), (0, 3), (3, 4)]) == [2, -1, 0]
