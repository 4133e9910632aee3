"""Numbers as text: one unit, and few digits."""

import pytest

from maelstream.jobs.format import (
    format_ago,
    format_bytes,
    format_decimal_bytes,
    format_duration,
    format_rate,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5000 * 2**40, "5,000.0 TiB")],
)
def test_bytes_have_a_binary_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_decimal_bytes_are_mb_or_gb() -> None:
    assert [format_decimal_bytes(count) for count in (5e5, 80e6, 1.5e9)] == ["0.5 MB", "80.0 MB", "1.50 GB"]


def test_rates_have_at_least_three_digits() -> None:
    assert [format_rate(rate) for rate in (None, 0.12345, 99.94, 12345.6)] == ["n/a", "0.123", "99.9", "12,346"]


def test_durations_are_hours_or_minutes() -> None:
    assert [format_duration(seconds) for seconds in (90, 3599, 5400)] == ["2 min", "60 min", "1.5 h"]


def test_ages_have_one_unit() -> None:
    times = [format_ago(seconds) for seconds in (5, 300, 7200, 200_000)]
    assert times == ["5 s ago", "5 min ago", "2 h ago", "2 d ago"]
