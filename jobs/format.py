"""Numbers as text for people: bytes, rates and times. Used by every command that prints figures."""


def format_bytes(count: float) -> str:
    """A size in the largest binary unit that is not above it, from B to TiB: "512 B", "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def format_decimal_bytes(count: float) -> str:
    """A size in MB or GB, the units of data sheets: "80.0 MB", "1.50 GB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def format_rate(rate: float | None) -> str:
    """A rate without its unit: whole numbers from 100 on, otherwise three digits; "n/a" for None."""
    if rate is None:
        return "n/a"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def format_duration(seconds: float) -> str:
    """A duration in hours or, below one hour, in minutes: "1.5 h", "34 min"."""
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def format_ago(seconds: float) -> str:
    """The time since an event, in one unit: "5 min ago"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def format_clock(seconds: float) -> str:
    """A duration as a clock shows it, in minutes and seconds, with hours only if there are any: "2:05", "1:02:05"."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"
