from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo_lightning.reward.gym import contains_answer, is_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12.", "12"),
        ("12", " 12\n"),
        ("1 + 11 = **12**", "12"),
        ("\\boxed{12}", "12"),
        ("答案是12。", "12"),
        ("1,000", "1000"),
        ("it costs 12.50", "12.5"),
        ("so -4", "-4"),
        ("so \N{MINUS SIGN}4", "-4"),
        ("that is 5-3", "3"),
        ("(1+2)-3", "3"),
        ("[1,2,3]", "3"),
        ("2/4", "1/2"),
        ("It is Friday, I think", "Friday"),
        ("a+b (c)", "a+b"),
        ("", ""),
    ],
)
def test_contained(text: str, answer: str):
    assert contains_answer(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("12 or 13", "12"),
        ("120", "12"),
        ("x12", "12"),
        ("12th", "12"),
        ("-12", "12"),
        ("5-3", "-3"),
        ("1/2", "2"),
        ("12.5", "12"),
        ("1,234", "234"),
        ("no number", "0"),
        ("Fridays", "Friday"),
        ("", "12"),
        ("something", ""),
        ("9" * 5000, "9"),
    ],
)
def test_not_contained(text: str, answer: str):
    assert not contains_answer(text, answer)


@given(st.text(), st.text())
def test_the_answer_itself_contains_the_answer(text: str, answer: str):
    assert is_answer(answer, answer)
    assert contains_answer(answer, answer)
    assert contains_answer(text, answer) or not is_answer(text, answer)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.integers())
def test_the_last_number_decides(last: Decimal, earlier: int):
    assert contains_answer(f"first {earlier}, and then {last:f}", f"{last:f}")
    assert contains_answer(f"first {last:f}, and then {earlier}", f"{last:f}") == (last == earlier)
