"""The text and tables of a run's report, read from the run's files."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maelstream.jobs.checkpointing.store import MANIFEST
from maelstream.jobs.evaluation.results import Evaluation, read_evaluations
from maelstream.jobs.format import format_ago, format_bytes, format_duration
from maelstream.jobs.recipe import LabelledData, flat_values
from maelstream.jobs.reporting.curves import Metrics
from maelstream.jobs.reporting.dataset_facts import facts, quarantined_files, short_sides
from maelstream.jobs.run_folder.data_paths import located
from maelstream.jobs.run_folder.environment import Start, read_starts
from maelstream.jobs.run_folder.folder import RunFolder
from maelstream.jobs.run_folder.status import read_status, state_of
from maelstream.shards.dataset import Dataset
from maelstream.shards.errors import MaelstreamError

_MAX_REPLACED = 20  # samples that are listed


def run_summary(folder: RunFolder, metrics: Metrics) -> dict[str, Any]:
    """The run's name, state, progress and current figures."""
    status, last = read_status(folder.status), metrics[-1]
    losses = [line["loss"] for line in metrics if line["loss"] is not None]
    rates = sorted(line["images_per_s"] for line in metrics)
    waits = sorted(line["data_wait"] for line in metrics)
    step, total = (status.step, status.total_steps) if status else (last["step"], 0)
    state = state_of(folder)
    figures = {
        "step": f"{step:,}",
        "epoch": f"{last['epoch']:.4g}",
        "loss": f"{losses[-1]:.4f}" if losses else "none yet",
        "first loss": f"{losses[0]:.4f}" if losses else "none yet",
        "images/s": f"{rates[len(rates) // 2]:,.0f}",
        "data wait": f"{waits[len(waits) // 2]:.2%}",
    }
    if state == "running" and last["images_per_s"]:
        batch_size = folder.any_recipe().optim.batch_size
        figures["time left"] = f"about {format_duration((total - step) * batch_size / last['images_per_s'])}"
    ranks = "1 rank" if status and status.ranks == 1 else f"{status.ranks} ranks" if status else ""
    updated = f"on {ranks}, last update {format_ago(time.time() - status.updated)}" if status else ""
    return {
        "name": str(folder.path),
        "state": state,
        "step": step,
        "total_steps": total,
        "progress": f"{step:,} of {total:,}" if total else f"{step:,}",
        "last_update": f"{step:,} of {total:,} steps {updated}" if status else "",
        "facts": figures,
    }


def flat_recipe(folder: RunFolder) -> dict[str, Any]:
    """The values of the recipe by dotted key."""
    return flat_values(asdict(folder.any_recipe()))


def changed_values(folder: RunFolder) -> dict[str, tuple[str, str]]:
    """The keys whose values differ from the defaults: (the run's value, the default)."""
    recipe = folder.any_recipe()
    default = flat_values(asdict(type(recipe)()))
    return {
        name: (shown_value(value), shown_value(default.get(name)))
        for name, value in flat_recipe(folder).items()
        if value != default.get(name)
    }


def differing_values(folders: list[RunFolder]) -> dict[str, list[str]]:
    """The keys in which the runs' recipes differ, with one value per run."""
    recipes = [flat_recipe(folder) for folder in folders]
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    values = {name: [shown_value(recipe.get(name)) for recipe in recipes] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def shown_value(value: Any) -> str:
    """A value, roughly as a recipe writes it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown_value, value))}]"
    return "—" if value is None else json.dumps(value) if isinstance(value, bool) or value == "" else str(value)


def dataset_cards(folder: RunFolder) -> list[dict[str, Any]]:
    """One card per dataset in the recipe; the card of a dataset that cannot be opened gives the error."""
    data = folder.any_recipe().data
    if isinstance(data, LabelledData):
        return [_card(located(folder, path) or path) for path in (data.train, data.val)]
    if data.stream.urls:
        stream = {"samples per epoch": f"{data.stream.samples:,}"}
        return [{"title": data.stream.urls, "missing": "", "facts": stream, "sides": [], "left_out": None}]
    return [_card(located(folder, path) or path) for path in data.mix or [data.dataset]]


def _card(path: str) -> dict[str, Any]:
    try:
        dataset = Dataset.open(path)
        reasons = quarantined_files(dataset) if dataset.manifest["quarantined"] else []
    except (MaelstreamError, OSError) as error:
        return {"title": path, "missing": f"The dataset cannot be opened now: {error}"}
    sides = short_sides(dataset)
    return {
        "title": f"{dataset.manifest['name']} / {dataset.manifest['split']}",
        "missing": "",
        "facts": {"location": path, **facts(dataset)},
        "sides": [(side, f"{count:,}", round(100 * count / max(sides.values()))) for side, count in sides.items()],
        "left_out": [{"files": files, "text": reason, "first": first} for files, reason, first in reasons],
    }


def replaced_samples(folder: RunFolder) -> tuple[int, list[dict[str, str]]]:
    """The number of samples that the run replaced, and the first of them with their reasons."""
    lines = folder.read_quarantined()
    return len(lines), [
        {"key": f"{line['shard']}: {line['key']}", "why": line["reason"]} for line in lines[:_MAX_REPLACED]
    ]


def checkpoint_rows(folder: RunFolder, epochs_per_step: float, verify: bool) -> list[dict[str, Any]]:
    """One row per checkpoint, newest first; checks sizes against the manifest, or every byte if `verify`."""
    store, rows = folder.checkpoints, []
    for step in reversed(store.steps()):
        size = sum(path.stat().st_size for path in store.at(step).glob("*") if path.name != MANIFEST)
        fault = store.fault(step) if verify else store.size_fault(step)
        intact = "every byte is intact" if verify else "sizes match; --verify reads every byte"
        row = {"step": f"{step:,}", "epoch": f"{step * epochs_per_step:.4g}", "size": format_bytes(size)}
        rows.append(row | {"state": fault or intact, "bad": bool(fault), "verified": verify})
    for bad in sorted(store.folder.glob("step-*.bad")):
        rows.append(
            {"step": bad.name, "epoch": "", "size": "", "state": "damaged, set aside", "bad": True, "verified": False}
        )
    return rows


def environment(folder: RunFolder) -> tuple[dict[str, str], list[dict[str, str]]]:
    """A table about the newest start, and one row per start; both are empty when no start was recorded."""
    if not (starts := read_starts(folder)):
        return {}, []
    last = starts[-1]
    newest = {
        "command": last.command,
        "ranks": f"{last.ranks}, {last.ranks_a_host} per host",
        "device": _device(last),
        "processor": f"{last.processor}, {last.cores} cores, {last.memory_gib:g} GiB",
        "host": f"{last.host}, {last.system}",
        "versions": ", ".join([f"Python {last.python}", *(f"{name} {v}" for name, v in last.packages.items())]),
    }
    lines = [
        {
            "when": time.strftime("%F %T", time.localtime(start.began)),
            "step": f"{start.step:,}",
            "where": f"{start.host}, {start.ranks} ranks, {_device(start)}",
            "command": start.command,
        }
        for start in starts
    ]
    return newest, lines


def _device(start: Start) -> str:
    if not start.devices:
        return "CPU"
    kinds = dict.fromkeys(start.devices)
    counts = ", ".join(f"{start.devices.count(kind)} x {kind}" for kind in kinds)
    return f"{counts} (CUDA {start.cuda})"


def evaluation_rows(folders: list[RunFolder]) -> list[dict[str, Any]]:
    """One row per evaluation of every run; the best top-1 of each job is marked."""
    found = []
    for number, folder in enumerate(folders):
        try:
            found += [(number, each) for each in read_evaluations(folder.path)]
        except OSError as error:
            raise MaelstreamError(f"{error.filename} cannot be read ({error.strerror}); remove it") from None
    rows = []
    for number, evaluation in found:
        scores = [other.top1 for _, other in found if other.job == evaluation.job]
        best = len(scores) > 1 and evaluation.top1 == max(scores)
        rows.append(_evaluation_row(evaluation, str(folders[number].path), number, best))
    return rows


def _evaluation_row(evaluation: Evaluation, run: str, number: int, best: bool) -> dict[str, Any]:
    return asdict(evaluation) | {
        "run": run,
        "number": number,
        "best": best,
        "epochs": "" if evaluation.epochs is None else f"{evaluation.epochs:g}",
        "step": "" if evaluation.step is None else f"{evaluation.step:,}",
        "images": f"{evaluation.images:,}",
        "val": Path(evaluation.val).name,
        "settings": ", ".join(_settings(evaluation.settings)),
    }


def _settings(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as text: the top-1 of each head if there are several; `blocks` only if not all blocks were trained."""
    heads: dict[str, dict[str, float]] = settings.get("all", {})
    for name, value in settings.items():
        if name == "all":
            yield from (f"{head}: {of_head['top1']:.2f} %" for head, of_head in heads.items() if len(heads) > 1)
        elif name == "undecodable":
            yield from [f"{len(value)} images undecodable"] if value else []
        elif not (name == "best" and len(heads) < 2) and not (name == "blocks" and value < 0):
            yield f"{name.replace('_', ' ')} {shown_value(value)}"
