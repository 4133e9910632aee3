"""The curves of a run as its report draws them: which there are, what they are called, few enough points to look at."""

from dataclasses import dataclass
from typing import Any, Literal

_MOST = 1500  # points of a curve
_NO_CURVES = ("step", "epoch", "skipped", "spike")


@dataclass(frozen=True)
class Chart:
    """One picture of the same value of all runs."""

    name: str
    """The key in metrics.jsonl."""
    title: str
    form: Literal["number", "share"] = "number"
    zero: bool = False
    """Whether the axis begins at 0."""


KNOWN = (
    Chart("loss", "loss"),
    Chart("top1", "top-1, %"),
    Chart("top5", "top-5, %"),
    Chart("lr", "learning rate", zero=True),
    Chart("images_per_s", "images/s", zero=True),
    Chart("data_wait", "share of time waiting for data", "share", zero=True),
    Chart("grad_norm", "length of the gradient"),
    Chart("mfu", "model FLOPs utilisation", "share", zero=True),
    Chart("memory_gib", "memory of rank 0, GiB", zero=True),
)

Metrics = list[dict[str, Any]]


def charts_of(runs: list[Metrics]) -> list[Chart]:
    """Those that at least one run has numbers for; values that nobody foresaw come last, under their own names."""
    names = dict.fromkeys(name for metrics in runs for line in metrics for name in line if line[name] is not None)
    known = {chart.name: chart for chart in KNOWN}
    others = [Chart(name, name) for name in names if name not in known and name not in _NO_CURVES]
    return [*(chart for chart in KNOWN if chart.name in names), *others]


def curves_of(metrics: Metrics) -> dict[str, dict[str, list[float | None]]]:
    """`step`, `epoch` and `value` of each chart by its name; a step that was skipped has the value None."""
    curves = {}
    for chart in charts_of([metrics]):
        lines = [line for line in metrics if chart.name in line]
        chosen = thinned([line[chart.name] for line in lines], _MOST)
        curves[chart.name] = {
            "step": [lines[n]["step"] for n in chosen],
            "epoch": [round(lines[n]["epoch"], 4) for n in chosen],
            "value": [lines[n][chart.name] for n in chosen],
        }
    return curves


def events_of(metrics: Metrics) -> dict[str, list[float]]:
    """Where steps were skipped or the loss jumped."""
    lines = [line for line in metrics if line["loss"] is None or line.get("spike")]
    return {"step": [line["step"] for line in lines], "epoch": [line["epoch"] for line in lines]}


def thinned(values: list[float | None], most: int) -> list[int]:
    """Indices of about `most` values, ascending: the lowest and the highest of each stretch, so that spikes stay."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches, chosen = most // 2, {0, len(values) - 1}
    for n in range(stretches):
        numbers = range(len(values) * n // stretches, len(values) * (n + 1) // stretches)
        finite = [(value, number) for number in numbers if (value := values[number]) is not None]
        chosen |= {min(finite)[1], max(finite)[1]} if finite else {numbers[0]}
    return sorted(chosen)
