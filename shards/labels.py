"""Labels: how one is read from a sample, and how the labels of all samples become numbers."""

import json
import re
import unicodedata
from decimal import Decimal
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa

from maelstream.shards.errors import DatasetError

LABEL_FIELDS = ("label", "cls", "class", "class_id", "target", "labels", "fine_label")
"""JSON fields and Parquet columns that hold the label, if the user names none."""
_LARGEST_LABEL = 99_999  # without class names; ImageNet-22k has 21,841
_WHOLE_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(\.0*)?")


def nfc(name: str) -> str:
    """`name` in Unicode's composed form: macOS writes é as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def label_text(value: Any) -> str:
    """A label as text; "" without one, which is null, an empty text or list, or -1 (test splits).

    Raises:
        ValueError: it is neither a whole number nor a text, nor a list of one of these.
    """
    if isinstance(value, list) and len(value) < 2:
        value = next(iter(value), None)
    if isinstance(value, list):
        raise ValueError(f"{_shown(value)} names several classes")
    if value is None:
        return ""
    if isinstance(value, float | Decimal) and value % 1 == 0:
        value = int(value)
    if isinstance(value, int):  # true is 1
        value = str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is neither a number nor a name")
    text = value.strip()
    text.encode()  # JSON can hold half a character; that raises ValueError
    return "" if whole_number(text) == -1 else text


def cls_label(data: bytes) -> str:
    """The label in a `.cls` file; ValueError if it is not text."""
    return label_text(data.decode("utf-8-sig"))


def json_label(data: bytes, field: str | None) -> str:
    """The label in a sample's JSON, "" without one; ValueError if it is not JSON or no label."""
    try:
        values = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    if not isinstance(values, dict):
        return label_text(values)
    return label_text(next((values[name] for name in label_fields(field) if name in values), None))


def label_fields(field: str | None) -> tuple[str, ...]:
    """Names under which a label can be found; `field` is the one that the user names."""
    return LABEL_FIELDS if field is None else (field,)


def number_labels(rows: pa.RecordBatch, classes: list[str] | None, named: bool) -> tuple[list[str], np.ndarray]:
    """Class names by label, and the label of each row, int32; without any label, no names and -1 for every row.

    `rows` has the columns `path` and `label`. `classes` are the names by label, if known. `named` says that labels are
    names, even if they look like numbers.

    Raises:
        DatasetError: a label is outside the classes, or some labels are numbers and others names.
    """
    encoded = rows.column("label").dictionary_encode()
    texts: list[str] = encoded.dictionary.to_pylist()
    found = [text for text in texts if text]
    if not found:
        return [], np.full(len(rows), -1, np.int32)

    def first_path(text: str) -> str:
        position = encoded.dictionary.index(text).as_py()
        return rows.column("path")[int(np.flatnonzero(encoded.indices.to_numpy() == position)[0])].as_py()

    numbers = {} if named else {text: number for text in found if (number := whole_number(text)) is not None}
    classes = None if classes is None else [nfc(name) for name in classes]
    if len(numbers) == len(found):
        if classes is None and max(numbers.values()) <= _LARGEST_LABEL:
            classes = [str(number) for number in range(max(numbers.values()) + 1)]
        last = len(classes) - 1 if classes is not None else _LARGEST_LABEL
        if outside := [text for text in found if not 0 <= numbers[text] <= last]:
            raise DatasetError(
                f"{first_path(outside[0])}: label {outside[0]} is outside the classes, 0 to {last}; give the class "
                "names with --classes"
            )
    elif numbers and classes is None:
        digits, name = next(iter(numbers)), next(text for text in found if text not in numbers)
        raise DatasetError(
            f"{first_path(name)}: label {name[:40]} is a name, but {first_path(digits)} has the number {digits}; make "
            "them one kind, give all names with --classes, or pack without labels (--no-labels)"
        )
    else:
        classes = classes or sorted({nfc(text) for text in found})
        by_name = {name: number for number, name in enumerate(classes)}
        numbers = {text: by_name.get(nfc(text), -1) for text in found}
        if outside := [text for text in found if numbers[text] < 0]:
            raise DatasetError(
                f"{first_path(outside[0])}: label {outside[0]} is none of the {len(classes):,} classes "
                f"({', '.join(classes[:3])}, ...); add it with --classes"
            )
    assert classes is not None
    by_number = np.array([numbers.get(text, -1) for text in texts], np.int32)
    return classes, by_number[encoded.indices.to_numpy()]


def first_difference(ours: list[str], theirs: list[str]) -> str | None:
    """Where two lists of class names differ first, in words; None if all names are the same in NFC."""
    for number, (one, other) in enumerate(zip_longest(map(nfc, ours), map(nfc, theirs))):
        if one is None or other is None:
            return f"only the {'first' if other is None else 'second'} has class {number}, {one or other}"
        if one != other:
            return f"class {number} is {one} in the first and {other} in the second"
    return None


def whole_number(text: str) -> int | None:
    """The number that a label's text is (`3`, `+3`, `03`, `3.0`); None if it is a name."""
    match = _WHOLE_NUMBER.fullmatch(text)
    return None if match is None else int(match[1])


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:40]
    except TypeError:
        return repr(value)[:40]
