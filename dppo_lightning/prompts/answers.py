"""Reference answers as text: what the numbers of a table mean."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from dppo_lightning.errors import DataError

# Tables turn whole numbers into one of these where a value is missing, or where their writer had no other kind.
Fractional = float | np.floating | Decimal


def answer_texts(values: Sequence[Any], places: Sequence[str]) -> list[str | None]:
    """The answers of one column as text; what is missing (null, NaN) is None.

    Floats and decimals are written without a fraction when every one of the column is a whole number, else as Python
    writes them: 6.0 among whole numbers is "6", beside 6.5 it is "6.0".

    Args:
        values: Text, numbers or what stands for nothing, in the order of the rows.
        places: File and line of each, for messages.

    Raises:
        DataError: A value is neither text nor a finite number, or a whole number that a float cannot hold exactly.
    """
    numbers = [value for value in values if isinstance(value, Fractional) and not _missing(value)]
    whole = all(math.isfinite(value) and value == int(value) for value in numbers)
    return [_text(value, whole, where) for value, where in zip(values, places, strict=True)]


def _text(value: Any, whole: bool, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Fractional) and _missing(value):
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer | Fractional):
        raise DataError(f"{where} must be text or a finite number, got {reprlib.repr(value)}")
    if not math.isfinite(value):
        raise DataError(f"{where} must be text or a finite number, got {reprlib.repr(value)}")
    if isinstance(value, int | np.integer) or not whole:
        return str(value)
    if not isinstance(value, Decimal) and abs(float(value)) >= exact_below(value):
        raise DataError(
            f"{where} is {value}, and such a float has lost the last digits of a whole number from "
            f"{exact_below(value)} on: store the answers as integers or text"
        )
    return str(int(value))


def narrowed(row: Mapping[str, Any], column: str, kind: str | None) -> Mapping[str, Any]:
    """The row with a number of ``column`` as the narrow float that the table holds: 0.1, not 0.10000000149011612.

    Args:
        row: As the table's reader gives it, every float a double.
        column: Maybe not in it.
        kind: Of the column, as pyarrow and datasets call it ("float" and "float32" are the same).
    """
    narrow = {"halffloat": np.float16, "float16": np.float16, "float": np.float32, "float32": np.float32}.get(str(kind))
    if narrow is None or row.get(column) is None:
        return row
    return {**row, column: narrow(row[column])}


def exact_below(value: Any) -> int:
    """Whole numbers below it are told apart by the float's kind: 2^53 for a double."""
    return 2 ** (int(np.finfo(type(value)).nmant) + 1)


def _missing(value: float | np.floating | Decimal) -> bool:
    return value.is_nan() if isinstance(value, Decimal) else bool(np.isnan(value))
