"""The two graphs of the GPU decoder, built and serialised without a GPU, equal those that are stored here.

A misspelt argument, an operator on the wrong device or a changed default of DALI shows on a machine without a driver.
If a change is meant, `python -m tests.pipeline.test_gpu_graphs` writes the new graphs.
"""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nvidia.dali import Pipeline

from maelstream.pipeline.config import DecodeConfig
from maelstream.pipeline.dali_graph import resized_windows

STORED = Path(__file__).with_name("gpu_graphs.json")
# Field numbers of DALI's protocol buffer; of values with the function that reads them.
OPERATORS, NAME, INPUTS, OUTPUTS, ARGUMENTS, ELEMENTS = 5, 1, 2, 3, 4, 7
VALUES: dict[int, Callable[[Any], Any]] = {
    3: lambda value: round(struct.unpack("<f", value)[0], 6),
    4: int,
    5: bytes.decode,
    6: bool,
}


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer; messages and texts as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield number, message[at : at + size]
        at += size


def argument(message: bytes) -> tuple[str, Any]:
    """Name and value of an argument: a number, a text, or a list of those of its elements."""
    found = list(fields(message))
    values = [argument(value)[1] for number, value in found if number == ELEMENTS]
    for number, value in found:
        if number in VALUES:
            values.append(VALUES[number](value))
    return dict(found)[NAME].decode(), values[0] if len(values) == 1 else values


def graph(form: Any) -> list[dict[str, Any]]:
    """The operators of the graph: name, inputs, outputs and arguments, without DALI's notes of source lines."""
    pipeline = Pipeline(batch_size=64, num_threads=4, device_id=None, prefetch_queue_depth=2)
    options = DecodeConfig(form=form).dali_gpu_options()
    with pipeline:
        pipeline.set_outputs(resized_windows(lambda _: (), (224, 224), "mixed", form, **options))
    operators = []
    for number, message in fields(pipeline.serialize()):
        if number == OPERATORS:
            parts = list(fields(message))
            arguments = dict(argument(value) for part, value in parts if part == ARGUMENTS)
            operators.append(
                {
                    "operator": dict(parts)[NAME].decode(),
                    "inputs": [dict(fields(value))[NAME].decode() for part, value in parts if part == INPUTS],
                    "outputs": [dict(fields(value))[NAME].decode() for part, value in parts if part == OUTPUTS],
                    "arguments": {name: arguments[name] for name in sorted(arguments) if not name.startswith("_")},
                }
            )
    return operators


@pytest.mark.parametrize("form", ["window", "full"])
def test_the_graph_of_the_gpu_decoder_is_the_stored_one(form: str) -> None:
    assert graph(form) == json.loads(STORED.read_text())[form]


def test_the_stored_graphs_decode_with_the_hardware_decoder_and_stay_on_the_gpu() -> None:
    for form, operators in json.loads(STORED.read_text()).items():
        devices = {each["operator"]: each["arguments"]["device"] for each in operators}
        assert devices["decoders__ImageSlice" if form == "window" else "decoders__Image"] == "mixed"
        assert {devices[name] for name in ("Resize", "Flip")} | {devices.get("Slice", "gpu")} == {"gpu"}
        (decoder,) = (each for each in operators if each["operator"].startswith("decoders__"))
        assert decoder["arguments"]["hw_decoder_load"] == 0.65


def test_a_misspelt_argument_of_the_gpu_decoder_is_an_error() -> None:
    with Pipeline(64, 4, None) as pipeline, pytest.raises(KeyError, match="hw_decoder_lod"):
        pipeline.set_outputs(resized_windows(lambda _: (), (224, 224), "mixed", "window", hw_decoder_lod=0.5))


if __name__ == "__main__":
    texts = [f'"{form}": [\n' + ",\n".join(map(json.dumps, graph(form))) + "\n]" for form in ("window", "full")]
    STORED.write_text("{" + ",\n".join(texts) + "}\n")
