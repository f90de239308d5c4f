from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from okavango.training.scores import Estimate, ScoreName, score, spoken, word_error_rate

USUAL: tuple[ScoreName, ...] = ("bleu4", "chrf", "exact_match")
EXPECTED = [
    "a red fox in the snow",
    "the old map of the city",
    "a small cat sleeps on the bed",
    "hot tea in a cup",
]
ANSWERS = ["a red fox in snow", "a map of the city", "the cat the cat the cat sleeps", "a cup of hot tea"]


def values(answers: Sequence[str], expected: Sequence[str], *names: ScoreName) -> dict[str, float]:
    return {name: found.value for name, found in score(answers, expected, names or USUAL).items()}


def of_each(name: ScoreName) -> list[float]:
    return [values([answer], [wanted], name)[name] for answer, wanted in zip(ANSWERS, EXPECTED, strict=True)]


def test_cider_is_that_of_its_authors() -> None:
    """Figures of pycocoevalcap 1.2 on these rows."""
    assert values(ANSWERS, EXPECTED, "cider")["cider"] == pytest.approx(4.262074117156416)
    assert values(EXPECTED, EXPECTED, "cider")["cider"] == pytest.approx(10)
    assert values([""] * 4, EXPECTED, "cider")["cider"] == 0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # 5 words in order of 5 and 6; 4 of 5 and 6; "the cat … sleeps" has "cat sleeps": 2 of 7 and 7; "hot tea"
    assert of_each("rouge_l") == pytest.approx([1000 / 11, 800 / 11, 400 / 14, 400 / 10])
    assert values(ANSWERS, EXPECTED, "rouge_l")["rouge_l"] == pytest.approx(sum(of_each("rouge_l")) / 4)
    assert values(["", "x"], ["", ""], "rouge_l")["rouge_l"] == 50


@pytest.mark.parametrize("name", ["bleu4", "chrf", "rouge_l", "cider", "wer", "exact_match"])
def test_intervals_hold_the_score_and_narrow_with_rows(name: ScoreName) -> None:
    chance = random.Random(3)
    rows = [
        (wanted if chance.random() < 0.5 else answer, wanted)
        for answer, wanted in zip(ANSWERS * 60, EXPECTED * 60, strict=True)
    ]

    def estimate(count: int) -> Estimate:
        answers, expected = zip(*rows[:count], strict=True)
        return score(answers, expected, [name])[name]

    few, many = estimate(24), estimate(240)
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < 0.6 * (few.high - few.low)
    assert estimate(240) == many
    sure = score(EXPECTED, EXPECTED, [name])[name]
    assert sure.high - sure.low == pytest.approx(0, abs=1e-9) or name == "cider"


def test_scores_are_those_that_sacrebleu_gives() -> None:
    found = values(["the cat sat on the mat", " a dog"], ["the cat sat on the mat", "a dog "])
    assert found == {"bleu4": pytest.approx(100), "chrf": pytest.approx(100), "exact_match": 1.0}
    found = values(["red heart", "blue"], ["red heart", "green heart"])
    assert found["exact_match"] == 0.5
    # 2 of 3 words right, the only pair right, shorter by one word of four: sqrt(2/3 · 1) · exp(1 − 4/3)
    assert found["bleu4"] == pytest.approx(100 * (2 / 3) ** 0.5 * 0.7165313, rel=1e-5)
    assert 0 < found["chrf"] < 100


def test_only_what_is_named_is_scored() -> None:
    answers, expected = ["press one now"], ["Press one."]
    assert values(answers, expected, "wer") == {"wer": 0.5}


@pytest.mark.parametrize(
    ("answer", "wer"),
    [
        ("press one for sales", 0),
        ("Press one, for sales!", 0),
        ("press two for sales", 1 / 4),
        ("press for sales", 1 / 4),
        ("press one for sales please", 1 / 4),
        ("", 1),
        ("we are all so very sorry", 6 / 4),
    ],
)
def test_substitutions_omissions_and_insertions_count_alike(answer: str, wer: float) -> None:
    assert word_error_rate([answer], ["press one for sales"]) == pytest.approx(wer)


def test_the_rate_is_of_all_words_and_not_a_mean_of_rows() -> None:
    assert word_error_rate(["no", "one two three four"], ["yes", "one two three four"]) == pytest.approx(
        1 / 5
    )


def test_words_where_none_are_expected_are_errors() -> None:
    assert word_error_rate(["hello there", "yes"], ["...", "yes"]) == pytest.approx(2)
    assert word_error_rate(["", "yes"], ["", "yes"]) == 0
    with pytest.raises(ValueError, match="has a word"):
        word_error_rate(["hello"], ["?"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("  I’m sorry,  that's NOT it. ", "i'm sorry that's not it"),
        ("Call-Forward on No Answer...", "call forward on no answer"),
        ("a 'quoted' word — o'clock", "a quoted word o'clock"),
        ("snake_case", "snake case"),
        ("ＡＢＣ １２", "abc 12"),
        ("Straße, naïve, où?", "straße naïve où"),
        ("¿?", ""),
    ],
)
def test_what_is_heard_of_a_text(text: str, words: str) -> None:
    assert spoken(text) == words


def test_scores_equal_hand_computed_ones() -> None:
    # BLEU: words 7 of 8, pairs 5 of 6, threes 3 of 4, fours 1 of 2; lengths are equal
    answers, expected = ["a b c d", "p q r x"], ["a b c d", "p q r s"]
    found = values(answers, expected)
    assert found["bleu4"] == pytest.approx(100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25)
    assert found["exact_match"] == 0.5


def test_bleu_is_shortened_for_short_answers_and_punishes_brevity() -> None:
    assert values(["red fox", "cat"], ["red fox", "cat"])["bleu4"] == pytest.approx(100)
    # words 1 of 1 and nothing longer; one word where three are expected
    assert values(["red"], ["red old fox"])["bleu4"] == pytest.approx(100 * math.exp(1 - 3))


def test_chrf_equals_a_hand_computed_one() -> None:
    # "ab" against "abc": of the orders 1 and 2, precision is 1 and 1, recall 2/3 and 1/2; beta is 2
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert values(["ab"], ["abc"])["chrf"] == pytest.approx(expected, rel=1e-3)
    assert values(["same"], ["same"])["chrf"] == pytest.approx(100)


def test_exact_means_equal_but_for_space_around() -> None:
    assert values([" fox \n", "Fox", "fox"], ["fox", "fox", "fox"])["exact_match"] == pytest.approx(2 / 3)
