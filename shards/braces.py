"""How many names a pattern in braces stands for, found without expanding it."""

import math
import re

MAX_EXPANDED = 1_000_000
"""Most names that a pattern may stand for; they are kept in memory."""
_GROUP = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def expanded_count(pattern: str) -> int:
    """How many names a pattern stands for. Of groups in groups the inner ones are counted, and a step is ignored."""
    return math.prod(map(_group_count, _GROUP.findall(pattern)))


def _group_count(group: str) -> int:
    if (ends := _RANGE.match(group)) is None:
        return group.count(",") + 1
    first, last = (int(end[:4000]) for end in ends.groups())  # Python refuses more than 4,300 digits
    return abs(last - first) + 1
