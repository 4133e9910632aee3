"""The curves in a run's report: the charts with their titles, and the points, reduced to at most some 1,500."""

from dataclasses import dataclass
from typing import Any, Literal

_MAX_POINTS = 1500  # per curve
_NO_CURVES = ("step", "epoch", "skipped", "spike")


@dataclass(frozen=True)
class Chart:
    """One chart: the same metric of every run."""

    name: str
    """The key in metrics.jsonl."""
    title: str
    form: Literal["number", "share"] = "number"
    """How values are written; a share is written in percent."""
    zero: bool = False
    """Whether the axis begins at 0."""


KNOWN_CHARTS = (
    Chart("loss", "loss"),
    Chart("top1", "top-1, %"),
    Chart("top5", "top-5, %"),
    Chart("lr", "learning rate", zero=True),
    Chart("images_per_s", "images/s", zero=True),
    Chart("data_wait", "data wait, share of time", "share", zero=True),
    Chart("grad_norm", "gradient norm"),
    Chart("mfu", "model FLOPs utilisation", "share", zero=True),
    Chart("memory_gib", "memory of rank 0, GiB", zero=True),
)

Metrics = list[dict[str, Any]]
"""The lines of metrics.jsonl, one per log step."""


def available_charts(runs: list[Metrics]) -> list[Chart]:
    """The charts that at least one run has values for; unknown metrics come last, titled by their own names."""
    names = dict.fromkeys(name for metrics in runs for line in metrics for name in line if line[name] is not None)
    known = {chart.name: chart for chart in KNOWN_CHARTS}
    others = [Chart(name, name) for name in names if name not in known and name not in _NO_CURVES]
    return [*(chart for chart in KNOWN_CHARTS if chart.name in names), *others]


def curve_points(metrics: Metrics) -> dict[str, dict[str, list[float | None]]]:
    """Lists of `step`, `epoch` and `value` for each chart by its name; the value of a skipped step is None."""
    curves = {}
    for chart in available_charts([metrics]):
        lines = [line for line in metrics if chart.name in line]
        chosen = downsampled([line[chart.name] for line in lines], _MAX_POINTS)
        curves[chart.name] = {
            "step": [lines[n]["step"] for n in chosen],
            "epoch": [round(lines[n]["epoch"], 4) for n in chosen],
            "value": [lines[n][chart.name] for n in chosen],
        }
    return curves


def event_positions(metrics: Metrics) -> dict[str, list[float]]:
    """The `step` and `epoch` of each skipped step and of each spike in the loss."""
    lines = [line for line in metrics if line["loss"] is None or line.get("spike")]
    return {"step": [line["step"] for line in lines], "epoch": [line["epoch"] for line in lines]}


def downsampled(values: list[float | None], limit: int) -> list[int]:
    """Ascending indices of about `limit` values: the lowest and the highest of each stretch, so that spikes remain."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches, chosen = limit // 2, {0, len(values) - 1}
    for n in range(stretches):
        numbers = range(len(values) * n // stretches, len(values) * (n + 1) // stretches)
        finite = [(value, number) for number in numbers if (value := values[number]) is not None]
        chosen |= {min(finite)[1], max(finite)[1]} if finite else {numbers[0]}
    return sorted(chosen)
