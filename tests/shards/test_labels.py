"""Labels are read as what they are, and messages name the image, the class and the remedy."""

import json
import unicodedata
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from maelstream.shards.errors import DatasetError
from maelstream.shards.labels import cls_label, first_difference, json_label, label_text, number_labels

NFC, NFD = (unicodedata.normalize(form, "müller") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(3, "3"), (3.0, "3"), (Decimal("3.00"), "3"), ([3], "3"), (True, "1"), (False, "0"), (" cat\n", "cat")],
        *[(None, ""), ("", ""), (" ", ""), ([], ""), ([None], ""), (-1, ""), (-1.0, ""), ("-1", ""), ("-1.0", "")],
        *[(-2, "-2"), ("1.5", "1.5")],
    ],
)
def test_a_label_is_a_number_a_name_or_nothing(value: Any, text: str) -> None:
    assert label_text(value) == text
    if not isinstance(value, Decimal):
        assert json_label(json.dumps({"label": value}).encode(), None) == text
        assert json_label(json.dumps({"kind": value}).encode(), "kind") == text


@pytest.mark.parametrize(
    "value", [1.5, float("nan"), float("inf"), Decimal("0.5"), [1, 2], [[1, 2]], {"id": 1}, b"cat", "\ud800"]
)
def test_anything_else_is_no_label(value: Any) -> None:
    with pytest.raises(ValueError):
        label_text(value)


def test_a_cls_file_may_begin_with_a_byte_order_mark_and_must_be_text() -> None:
    assert cls_label(b"\xef\xbb\xbf7\r\n") == "7"
    with pytest.raises(ValueError):
        cls_label(b"\xff\xfe7\0")
    with pytest.raises(ValueError, match="nested too deep"):
        json_label(b"[" * 100_000, None)


def numbered(labels: list[str], classes: list[str] | None = None, named: bool = False) -> tuple[list[str], list[int]]:
    columns = {"path": [f"{n}.jpg" for n in range(len(labels))], "label": labels}
    names, numbers = number_labels(pa.RecordBatch.from_pydict(columns), classes, named)
    assert numbers.dtype == np.int32
    return names, numbers.tolist()


def test_numbers_are_numbers_however_they_are_written() -> None:
    assert numbered(["2", "+1", "010", "2.0", "0"]) == ([str(n) for n in range(11)], [2, 1, 10, 2, 0])
    assert numbered(["1", "", "0"], ["cat", "dog"]) == (["cat", "dog"], [1, -1, 0])
    assert numbered(["10", "2"], named=True) == (["10", "2"], [0, 1])  # folders, sorted as text
    assert numbered(["", ""]) == ([], [-1, -1])


def test_two_spellings_of_a_name_are_one_class() -> None:
    assert numbered([NFC, NFD, "a"]) == (["a", NFC], [1, 1, 0])
    assert numbered([NFC, "a"], [NFD, "a"]) == ([NFC, "a"], [0, 1])


@pytest.mark.parametrize(
    ("labels", "classes", "complaint"),
    [
        (["0", "1", "unknown"], None, r"2\.jpg: label unknown is a name, but 0\.jpg has the number 0; .*--no-labels"),
        (
            ["0", "2"],
            ["a", "b"],
            r"1\.jpg: label 2 is outside the classes, 0 to 1; give the class names",
        ),
        (["0", "-2"], None, r"1\.jpg: label -2 is outside"),
        (["cat", "cow"], ["cat", "dog"], r"1\.jpg: label cow is none of the 2 classes \(cat, dog, \.\.\.\)"),
    ],
)
def test_a_label_without_a_class_is_named(labels: list[str], classes: list[str] | None, complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        numbered(labels, classes)


def test_the_first_difference_of_two_lists_of_classes_is_in_words() -> None:
    assert first_difference([NFC, "a"], [NFD, "a"]) is None
    assert first_difference(["a", "b", "c"], ["a", "x", "c"]) == "class 1 is b in the first and x in the second"
    assert first_difference(["a", "b"], ["a"]) == "only the first has class 1, b"
    assert first_difference([], ["a"]) == "only the second has class 0, a"
