"""The table and the summary that `maelstream profile` prints."""

from typing import Any

from rich.table import Table

from maelstream.jobs.format import format_decimal_bytes, format_rate


def stage_table(figures: dict[str, Any]) -> Table:
    """One row per stage, then the run end to end; `figures` are those of `profile_recipe`."""
    machine = figures["machine"]
    title = f"{figures['recipe']} on {machine['name']}, {machine['cores']} cores, {figures['ranks']} ranks"
    result = Table(
        "stage", "images/s alone", "bytes/s", "of the limit", "busy in the run", "what limits it", title=title
    )
    run = figures["whole"]
    run_rate = run["images_per_s_with_the_recipe_s_batch"] if run else None
    for name, stage in figures["stages"].items():
        alone, limit = stage["images_per_s"], stage["limit_images_per_s"]
        result.add_row(
            name,
            format_rate(alone),
            format_decimal_bytes(stage["bytes_per_s"]) if stage["bytes_per_s"] else "",
            f"{alone / limit:.0%}" if alone and limit else "",
            f"{run_rate / alone:.1%}" if alone and run_rate else "",
            stage["why"],
            style="bold" if name == figures["verdict"]["limit"] else "dim" if alone is None else "",
        )
    if run:
        counts = figures["micro_batches"]
        rates = {"end to end": (run["images_per_s"], "")}
        if counts["measured"] != counts["recipe"]:
            why = f"computed: one update per {counts['recipe']} micro-batches instead of {counts['measured']}"
            rates["end to end, recipe's batch"] = run["images_per_s_with_the_recipe_s_batch"], why
        for name, (rate, why) in rates.items():
            size = format_decimal_bytes(rate * figures["bytes_an_image"])
            result.add_row(name, format_rate(rate), size, "", "", why, style="bold")
    return result


def engine_line(share: float | None, noise: float | None) -> str:
    """What the engine adds to forward and backward; no figure that the noise of the measurement exceeds."""
    if share is None or noise is None:
        return "DeepSpeed's engine: not measured at ZeRO 3, where no rank has the whole model to run without it"
    if share > noise:
        return f"DeepSpeed's engine: {share:.1%} of the time of forward and backward"
    return f"DeepSpeed's engine: less than the noise of this measurement ({max(noise, -share):.1%})"


def summary(figures: dict[str, Any]) -> list[str]:
    """Lines below the table: the machine, the run end to end, and the bottleneck."""
    run, machine = figures["whole"], figures["machine"]
    products = f"{machine['matrix_flops_per_s'] / 1e12:,.3g} TFLOP/s of {machine['matrix_dtype']} matrix products"
    sheet = machine["datasheet_flops_per_s"]
    products += f" (data sheet: {sheet / 1e12:,.0f})" if sheet else ""
    lines = [f"the machine: {products}, memory {format_decimal_bytes(machine['memory_bytes_per_s'])}/s"]
    if run is not None:
        counts = figures["micro_batches"]
        sheet = f", {run['mfu_datasheet']:.1%} of the data sheet's" if run["mfu_datasheet"] else ""
        gpu = f", GPU busy {run['gpu_utilisation']:.0%}" if run["gpu_utilisation"] is not None else ""
        gpu_memory = f", {format_decimal_bytes(run['gpu_bytes'])} on the GPU" if run["gpu_bytes"] is not None else ""
        lines += [
            f"end to end: {run['steps']} steps of {counts['measured']} micro-batches (recipe: {counts['recipe']})"
            f" of {figures['micro_batch_size']} images per rank, {format_rate(run['images_per_s'])} images/s, "
            f"MFU {run['mfu_measured']:.1%} of the measured rate{sheet}",
            f"data wait {run['data_wait']:.2%}; of a step of {run['step_s'] * 1e3:,.1f} ms: p50 "
            f"{run['data_wait_p50_s'] * 1e3:.2f} ms, p99 {run['data_wait_p99_s'] * 1e3:.2f} ms",
            f"cores busy {run['cpu_utilisation']:.0%}{gpu}; "
            f"memory {format_decimal_bytes(run['rss_bytes'])}{gpu_memory}",
            engine_line(run["engine_share"], run["engine_noise"]),
        ]
    return [*lines, figures["verdict"]["words"]]
