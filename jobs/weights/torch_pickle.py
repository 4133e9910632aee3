"""An unpickler that runs nothing from the file.

A pickle is a program that calls functions by name, so every name in the file becomes an object of this module. The few
functions that rebuild tensors and plain data (paths, numpy scalars, dates) become functions of this module, which
return inert values. Every other name becomes a new, empty class; a call of it is recorded in `called` and not made. No
name is ever imported. Tensors become references to their place in the file.
"""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names that protocol 2 writes
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


class StorageRef(NamedTuple):
    """A storage in the file: `length` numbers of `dtype`, from number `start` on."""

    key: str
    dtype: torch.dtype
    start: int
    length: int


class TensorRef(NamedTuple):
    """A tensor in the file, as a view of a storage; offset and stride in numbers of `dtype`."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Items(dict):
    """A dict, a subclass of dict, or any object of the file: the items that were set, and its attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def append(self, item: Any) -> None:  # of subclasses of list
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:  # of subclasses of set
        pass

    def __hash__(self) -> int:  # type: ignore[override]  # such objects can be keys
        return id(self)


class SafeUnpickler(pickle.Unpickler):
    """Builds plain values; see the module's docstring. `called` gets the names that a file asks to call."""

    def __init__(self, file: Any, called: list[str]):
        super().__init__(file, encoding="latin1")  # strings of Python 2
        self._called = called
        self.item_sizes: dict[str, int] = {}
        self.tensors: dict[str, TensorRef] = {}  # by key, in a tar file

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        full = f"{module}.{name}"
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if full in _DTYPES:
            return _DTYPES[full]
        if full in _PLAIN:
            return _Function(_PLAIN[full])
        return self._empty_class(full)

    def persistent_load(self, saved: Any) -> StorageRef | TensorRef:
        if isinstance(saved, int | str):
            return self.tensors[str(saved)]
        kind, dtype, key, _, count, *view = saved
        if kind not in ("storage", b"storage") or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("only storages are stored outside the pickle")
        self.item_sizes[key] = dtype.itemsize
        _, start, count = view[0] if view and view[0] is not None else ("", 0, count)
        return StorageRef(key, dtype, start, count)

    def _empty_class(self, full: str) -> type:
        called = self._called

        class Kind(type):
            def __call__(cls, *args: Any, **kwargs: Any) -> Any:
                called.append(full)
                return cls.__new__(cls)  # type: ignore[call-overload]

        def result_of_call(self: Any, *args: Any) -> Any:
            return self

        return Kind(full, (Items,), {"__module__": __name__, "__call__": result_of_call})


class _Function:
    """A function of this module; made anew for each use, so a file cannot change it for the next file."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def tensor_ref(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> TensorRef:
    """A reference to a tensor; UnpicklingError unless `storage` is a reference to a storage."""
    if type(storage) is not StorageRef:
        raise pickle.UnpicklingError("a tensor without a storage")
    return TensorRef(storage, offset, tuple(size), tuple(stride), storage.dtype)


def _typed_tensor(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a dtype")
    return tensor_ref(storage, offset, size, stride)._replace(dtype=dtype)


def _of_subclass(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if type(function) is not _Function:
        raise pickle.UnpicklingError("a tensor that is not built by torch")
    return function(*args)


def _object(kind: Any, *_: Any) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Items)):
        raise pickle.UnpicklingError("an object of no class")
    return kind.__new__(kind)


def _items(*args: Any) -> Items:
    return Items(*(args[-1:] if args and isinstance(args[-1], dict | list) else ()))


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _path(*parts: Any) -> str:
    root = "/" if parts[:1] == ("/",) else ""
    return root + "/".join(str(part) for part in parts[len(root) :])


def _list(values: Any = (), *_: Any) -> list[Any]:
    return list(values)


def _tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _nothing(*_: Any) -> Items:
    return Items()


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
_NUMPY = ("core.multiarray", "_core.multiarray", "core.numeric", "_core.numeric")
_PLAIN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": tensor_ref,
    "torch._utils._rebuild_tensor_v2": tensor_ref,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    "torch.Size": _tuple,
    "torch.device": _first,
    "torch.serialization._get_layout": _first,
    "collections.OrderedDict": _items,
    "collections.defaultdict": _nothing,
    "collections.Counter": _items,
    "collections.deque": _list,
    "copyreg._reconstructor": _object,
    "_codecs.encode": _first,
    "builtins.set": _list,
    "builtins.frozenset": _tuple,
    "builtins.bytearray": _nothing,
    "builtins.complex": _nothing,
    "builtins.slice": _nothing,
    "builtins.range": _nothing,
    "builtins.xrange": _nothing,
    "decimal.Decimal": _first,
    "uuid.UUID": _nothing,
    **dict.fromkeys([f"pathlib.{name}" for name in _PATHS], _path),
    **dict.fromkeys([f"pathlib._local.{name}" for name in _PATHS], _path),  # Python 3.13
    **dict.fromkeys([f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")], _nothing),
    **dict.fromkeys([f"numpy.{name}" for name in ("dtype", "ndarray")], _nothing),
    **{f"numpy.{m}.{name}": _nothing for m in _NUMPY for name in ("scalar", "_reconstruct", "_frombuffer")},
}
"""Functions of files, and what stands for them: tensors, containers, and plain data without its value."""
