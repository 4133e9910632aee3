"""The number of names that a pattern in braces stands for is found without expanding it."""

import braceexpand
import pytest

from maelstream.shards.braces import MAX_EXPANDED, expanded_count


@pytest.mark.parametrize("pattern", ["a.tar", "a-{0..9}", "{a,b}-{0000..0010}.tar", "{5..-3}", "{}", "{a}{b,c,d}"])
def test_the_count_is_that_of_the_expansion(pattern: str) -> None:
    assert expanded_count(pattern) == len(list(braceexpand.braceexpand(pattern)))


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999999999999999}", "{0..9999}" * 2, "{a,b}" * 30, "{1" + "0" * 6000 + "..5}"]
)
def test_numbers_of_any_length_are_counted(pattern: str) -> None:
    assert expanded_count(pattern) > MAX_EXPANDED
