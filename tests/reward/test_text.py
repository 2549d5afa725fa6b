import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.base.errors import ConfigError, RewardError
from dppo_lightning.reward import ExactMatch, RegexMatch, RewardFunction, Sample


def value(reward: RewardFunction, completion: str, answer: str | None) -> float:
    return reward([Sample("question", completion, answer)])[0].value


@given(st.text(), st.sampled_from(["", " ", "\n", "\t "]))
def test_an_answer_matches_itself_and_not_a_longer_text(answer: str, space: str):
    assert value(ExactMatch(), space + answer + space, answer) == 1
    assert value(ExactMatch(), answer + "x", answer) == 0
    assert value(ExactMatch(strip=False), answer + " ", answer) == 0


@pytest.mark.parametrize(("ignore_case", "expected"), [(True, 1), (False, 0)])
def test_case_counts_unless_told_otherwise(ignore_case: bool, expected: float):
    assert value(ExactMatch(ignore_case=ignore_case), "STRASSE", "straße") == expected


def test_a_pattern_is_searched_anywhere():
    assert value(RegexMatch(r"\d+"), "it is 12", None) == 1
    assert value(RegexMatch(r"^\d+"), "it is 12", None) == 0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("= 7", 1), ("= 8 no, = 7 ", 1), ("= 7 no, = 8", 0), ("7", 0), ("", 0)],
)
def test_the_last_match_is_compared_with_the_answer(completion: str, expected: float):
    assert value(RegexMatch(r"= (\d)", compare=True), completion, " 7") == expected


def test_a_group_that_took_no_part_in_the_match_is_no_answer():
    assert value(RegexMatch(r"(a)|b", compare=True), "a b", "a") == 0


def test_a_wrong_pattern_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=re.escape("pattern '(' is not a regular expression")) as error:
        RegexMatch("(")
    assert "\n" not in str(error.value)


def test_comparing_needs_a_group():
    with pytest.raises(ConfigError, match="has no group"):
        RegexMatch(r"\d+", compare=True)


@pytest.mark.parametrize("reward", [ExactMatch(), RegexMatch("(a)", compare=True)])
def test_a_missing_reference_answer_is_an_error(reward: RewardFunction):
    with pytest.raises(RewardError, match="needs a reference answer, and prompt 'question' has none"):
        value(reward, "a", None)
