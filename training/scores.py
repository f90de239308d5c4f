"""How near answers are to what was expected, and how sure that is: texts in, figures out."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

ScoreName = Literal["bleu4", "chrf", "rouge_l", "cider", "wer", "exact_match"]

_RESAMPLES = 1000
_DROPPED = re.compile(r"[^\w\s']|_")
_QUOTES = str.maketrans("’‘`´", "''''")
_OUTER_QUOTES = re.compile(r"(?<!\w)'|'(?!\w)")
_GRAMS = 4
_CIDER_SIGMA = 6.0


@dataclass(frozen=True)
class Estimate:
    """A score, and the 95 % interval that resampled rows give it (Efron 1979)."""

    value: float
    low: float
    high: float


def score(answers: Sequence[str], expected: Sequence[str], names: Iterable[ScoreName]) -> dict[str, Estimate]:
    """The scores that are named, over all answers.

    bleu4, chrf: as sacrebleu counts them, 0 to 100.
    rouge_l: mean F1 of the longest common subsequence of words (Lin 2004), 0 to 100.
    cider: CIDEr-D (Vedantam et al. 2015), words weighed by how rare they are in what is expected; 0 to 10.
    wer: words substituted, left out and put in, by the words expected; more than 1 is possible.
    exact_match: the share of answers that are what was expected, 0 to 1.

    Raises:
        ValueError: word error rate, and nothing that is expected has a word.
    """
    return {name: _SCORES[name](answers, expected) for name in names}


def word_error_rate(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Words substituted, left out and put in over all answers, by the words expected, both as `spoken`."""
    return _word_errors(answers, expected).value


def spoken(text: str) -> str:
    """What is heard of a text: NFKC, lower case, one space between words, no punctuation but apostrophes in
    words; hyphens part words. Numbers stay as they are written."""
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES).lower()
    return " ".join(_OUTER_QUOTES.sub(" ", _DROPPED.sub(" ", text)).split())


def _bleu(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    from sacrebleu.metrics.bleu import BLEU

    # effective order: answers that all have fewer than four words are not worth nothing
    return _by_sacrebleu(BLEU(effective_order=True), answers, expected)


def _chrf(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    from sacrebleu.metrics.chrf import CHRF

    return _by_sacrebleu(CHRF(), answers, expected)


def _by_sacrebleu(metric: Any, answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    from sacrebleu.significance import PairedTest

    # the first system alone: it is compared with none, and has an interval all the same
    test = PairedTest(
        [("answers", list(answers))],
        {"score": metric},
        [list(expected)],
        test_type="bs",
        n_samples=_RESAMPLES,
    )
    result: Any = next(results[0] for name, results in test()[1].items() if name != "System")
    value, mean, half = float(result.score), float(result.mean), float(result.ci)
    return Estimate(value, min(mean - half, value), max(mean + half, value))


def _word_errors(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    """As jiwer counts them."""
    import jiwer

    wrong, words = [], []
    for answer, wanted in zip(map(spoken, answers), map(spoken, expected), strict=True):
        words.append(len(wanted.split()))
        if not wanted:  # jiwer refuses an empty reference, in which every word of the answer is one too many
            wrong.append(len(answer.split()))
            continue
        counted = jiwer.process_words(wanted, answer)
        wrong.append(counted.substitutions + counted.deletions + counted.insertions)
    if not sum(words):
        raise ValueError("nothing that is expected has a word")
    return _ratio(wrong, words)


def _exact(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    return _mean([float(a.strip() == e.strip()) for a, e in zip(answers, expected, strict=True)])


def _rouge_l(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    pairs = zip(map(_words, answers), map(_words, expected), strict=True)
    return _mean([100 * _common_f1(answer, wanted) for answer, wanted in pairs])


def _common_f1(answer: Sequence[str], wanted: Sequence[str]) -> float:
    if not answer or not wanted:
        return float(list(answer) == list(wanted))
    common = _longest_common(answer, wanted)
    return 2 * common / (len(answer) + len(wanted))


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0
        for k, other in enumerate(right, 1):
            before, row[k] = row[k], before + 1 if word == other else max(row[k], row[k - 1])
    return row[-1]


def _cider(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    wanted = [_grams(_words(text)) for text in expected]
    seen = [Counter(gram for each in wanted for gram in each[n]) for n in range(_GRAMS)]
    rarity = [{gram: math.log(len(wanted) / count) for gram, count in each.items()} for each in seen]
    unseen = math.log(max(1, len(wanted)))
    rows = []
    for text, own in zip(answers, wanted, strict=True):
        words = _words(text)
        length = len(words) - sum(own[0].values())
        likeness = [_clipped_cosine(gram, own[n], rarity[n], unseen) for n, gram in enumerate(_grams(words))]
        rows.append(10 * math.exp(-(length**2) / (2 * _CIDER_SIGMA**2)) * sum(likeness) / _GRAMS)
    return _mean(rows)


def _clipped_cosine(
    answer: Counter[tuple[str, ...]],
    wanted: Counter[tuple[str, ...]],
    rarity: dict[tuple[str, ...], float],
    unseen: float,
) -> float:
    """Cosine of counts weighed by rarity; of the answer no more counts than is wanted, so that repeating a
    word wins nothing."""

    def weight(gram: tuple[str, ...]) -> float:
        return rarity.get(gram, unseen)

    shared = sum(min(n, wanted[gram]) * wanted[gram] * weight(gram) ** 2 for gram, n in answer.items())
    norms = [math.sqrt(sum((n * weight(gram)) ** 2 for gram, n in side.items())) for side in (answer, wanted)]
    return shared / (norms[0] * norms[1]) if all(norms) else 0.0


def _grams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, _GRAMS + 1)]


def _words(text: str) -> list[str]:
    return spoken(text).split()


def _mean(rows: Sequence[float]) -> Estimate:
    return _ratio(rows, [1] * len(rows))


def _ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Sum by sum, and what rows that are drawn again with replacement make of it."""
    top, bottom = np.asarray(above, float), np.asarray(below, float)
    drawn = np.random.default_rng(0).integers(0, len(top), (_RESAMPLES, len(top)))
    sums = bottom[drawn].sum(1)
    found = np.divide(top[drawn].sum(1), sums, out=np.zeros(_RESAMPLES), where=sums > 0)
    low, high = np.quantile(found, [0.025, 0.975])
    value = float(top.sum() / bottom.sum())
    return Estimate(value, min(float(low), value), max(float(high), value))


_SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], Estimate]] = {
    "bleu4": _bleu,
    "chrf": _chrf,
    "rouge_l": _rouge_l,
    "cider": _cider,
    "wer": _word_errors,
    "exact_match": _exact,
}
