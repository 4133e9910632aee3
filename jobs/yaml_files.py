"""Reads YAML 1.2 (core schema), as files of other tools are written today: `on` is a text and `1e-4` a number.

PyYAML reads YAML 1.1, where `on` is true, `1e-4` a text, `010` eight and `2020-01-01` a date, and where a repeated key
silently replaces the first.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES = 10 * 2**20
_MAX_DEPTH = 50

_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"


class YamlError(Exception):
    """A file or text that cannot be read as YAML; the message is the reason, on one line."""


def read_yaml(path: Path) -> Any:
    """The values in a file.

    Raises:
        YamlError: it cannot be read, is not a regular file, is larger than 10 MB, or is not YAML without anchors.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for a writer
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise YamlError("it is not a regular file")
            if status.st_size > _MAX_BYTES:
                raise YamlError(f"it has {status.st_size:,} bytes, more than {_MAX_BYTES:,}")
            text = file.read().decode()
    except UnicodeDecodeError as error:
        raise YamlError(f"it is not UTF-8 ({error.reason} at byte {error.start:,})") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise YamlError(getattr(error, "strerror", None) or str(error)) from None
    return parse_yaml(text)


def parse_yaml(text: str) -> Any:
    """The values in `text`. Raises YamlError if it is not YAML, repeats a key, or has anchors or deep nesting."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(f"it is not YAML: {' '.join(str(error).split())}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain data, with the rules of YAML 1.2."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: anchors and aliases are not read")
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"more than {_MAX_DEPTH} levels of nesting")
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            line = node.value[number][0].start_mark.line + 1
            if not isinstance(key, str | int | float | bool) and key is not None:
                raise yaml.YAMLError(f"line {line}: a key must be a text or a number")
            if key in keys[:number]:
                raise yaml.YAMLError(f"line {line}: the key {key} is given twice")
        values = [self.construct_object(value, deep=True) for _, value in node.value]
        return dict(zip(keys, values, strict=True))


def _mapping(loader: _Loader, node: Any) -> dict:
    return loader.construct_mapping(node)


def _integer(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _real(loader: _Loader, node: Any) -> float:
    text = loader.construct_scalar(node)
    return float(text.replace(".", "", 1) if re.fullmatch(r"[-+]?\.\D+", text) else text)


def _truth(loader: _Loader, node: Any) -> bool:
    return loader.construct_scalar(node) in _TRUE


_Loader.yaml_implicit_resolvers = {}  # of YAML 1.1
_Loader.yaml_constructors = {  # without dates, bytes and sets, which recipes do not have
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "str", "seq")
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(f"(?:{'|'.join(_TRUE + _FALSE)})$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT})$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)
_Loader.add_constructor("tag:yaml.org,2002:bool", _truth)
