"""Strict and lenient accuracy: whether a completion is the answer, and whether it contains it."""

from __future__ import annotations

import re
from fractions import Fraction

# Latin letters only: a number inside "x12" or "12th" is not one, a number between Chinese characters is.
# A minus after a digit, a letter or a bracket is an operator: "5-3" ends with 3.
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_./])(?:(?<![A-Za-z0-9_)])-)?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|/0*[1-9][0-9]*)?(?![A-Za-z0-9_])"
)


def is_answer(text: str, answer: str) -> bool:
    """Strict: the text equals the answer, white space around both ignored."""
    return text.strip() == answer.strip()


def contains_answer(text: str, answer: str) -> bool:
    """Lenient: the text has the answer in it.

    An answer that is a number must equal the last number in the text ("1,000" and "1000.0" are equal); any other must
    occur in the text and not as a part of a longer word.
    """
    answer = answer.strip()
    if is_answer(text, answer):
        return True
    number = _value(answer)
    if number is not None:
        numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
        return bool(numbers) and _value(numbers[-1]) == number
    return answer != "" and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _value(text: str) -> Fraction | None:
    """The number that the whole text is, or None."""
    if _NUMBER.fullmatch(text) is None:
        return None
    try:
        return Fraction(text.replace(",", ""))
    except ValueError:  # Python refuses integers of more than 4,300 digits; a model may write one
        return None
