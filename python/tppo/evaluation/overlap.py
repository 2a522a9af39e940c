"""Words that answers share with the true queries, and with each other; all from 0 to 100."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sacrebleu.metrics import BLEU

from tppo.labels.words import fold, word_spans

ORDER = 4  # the longest n-gram


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of all answers together against one reference each (Papineni et al., 2002).

    sacrebleu's, over the words that the rule sees, folded, instead of a tokenizer for one language.
    """
    metric = BLEU(tokenize="none", force=True, smooth_method="none")
    return metric.corpus_score(
        [" ".join(words(text)) for text in texts],
        [[" ".join(words(text)) for text in references]],
    ).score


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): 100 * 2 L / (m + n), with m and n words and a longest common subsequence
    of L words; 0 without words.
    """
    one, other = words(text), words(reference)
    if not one or not other:
        return 0.0
    longest = [0] * (len(other) + 1)  # of the words of `one` so far and the first j of `other`
    for word in one:
        before = longest
        longest = [0]
        for j, another in enumerate(other):
            same = before[j] + 1
            longest.append(same if word == another else max(before[j + 1], longest[j]))
    return 100 * 2 * longest[-1] / (len(one) + len(other))


def self_bleu(texts: Sequence[str]) -> float:
    """BLEU-4 of all answers together, each against all others (Zhu et al., 2018, Texygen, there as
    a mean over answers): the smaller, the more do the answers of different users differ.

    Of each n-gram the two largest counts in one answer are kept: the largest count in another
    answer is one of them, so that the work grows with the number of answers, not with its square.
    """
    answers = [words(text) for text in texts]
    if len(answers) < 2:
        return 0.0
    counts = [_ngrams(answer) for answer in answers]
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for found in counts:
        for ngram, n in found.items():
            first, second = largest.get(ngram, (0, 0))
            largest[ngram] = (max(first, n), max(second, min(first, n)))
    correct, total = [0] * ORDER, [0] * ORDER
    for found in counts:
        for ngram, n in found.items():
            first, second = largest[ngram]
            correct[len(ngram) - 1] += min(n, second if n == first else first)
            total[len(ngram) - 1] += n
    lengths = Counter(map(len, answers))
    closest = [_closest(len(answer), lengths) for answer in answers]
    return BLEU.compute_bleu(
        correct, total, sum(map(len, answers)), sum(closest), smooth_method="none"
    ).score


def words(text: str) -> list[str]:
    """The words of a text, folded."""
    return [fold(text[start:end]) for start, end in word_spans(text)]


def _ngrams(answer: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(answer[i : i + n])
        for n in range(1, ORDER + 1)
        for i in range(len(answer) - n + 1)
    )


def _closest(length: int, lengths: Counter[int]) -> int:
    """The length of another answer that is nearest, of two the shorter one, as BLEU wants it."""
    if lengths[length] > 1:
        return length
    return min((other for other in lengths if other != length),
               key=lambda other: (abs(other - length), other))  # fmt: skip
