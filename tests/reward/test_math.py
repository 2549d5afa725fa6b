import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_lightning.base.errors import RewardError
from dppo_lightning.reward import MathReward, Sample


def value(completion: str, answer: str | None) -> float:
    return MathReward()([Sample("question", completion, answer)])[0].value


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so the answer is 12.", "12"),
        ("$\\frac{1}{2}$", "0.5"),
        ("1/2", "\\frac{1}{2}"),
        ("\\boxed{1 + x^2}", "x^2+1"),
        ("\\boxed{\\sqrt2}", "$\\sqrt{2}$"),
        ("first 3, then \\boxed{4}", "\\boxed{4}"),
        ("$1000$", "1,000"),
    ],
)
def test_equal_as_mathematics(completion: str, answer: str):
    assert value(completion, answer) == 1


@pytest.mark.parametrize(
    ("completion", "answer"),
    [("12", "13"), ("", "12"), ("no number", "12"), ("\\boxed{x}", "x^2"), ("\\boxed{4} no, \\boxed{3}", "4")],
)
def test_not_equal(completion: str, answer: str):
    assert value(completion, answer) == 0


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="0123456789+-*/^=(){}[]\\$.,xfracsqt box", max_size=40))
def test_any_text_can_be_graded(completion: str):
    assert value(completion, "12345678901") in (0, 1)


def test_works_off_the_main_thread():
    values: list[float] = []
    thread = threading.Thread(target=lambda: values.extend([value("\\boxed{7}", "7"), value("8", "7")]))
    thread.start()
    thread.join()
    assert values == [1, 0]


def test_a_missing_reference_answer_is_an_error():
    with pytest.raises(RewardError, match="MathReward needs a reference answer"):
        value("7", None)


@pytest.mark.parametrize("answer", ["", "\\"])
def test_a_reference_answer_that_is_no_mathematics_is_an_error(answer: str):
    with pytest.raises(RewardError, match="cannot read the reference answer"):
        value("7", answer)
