"""`.pt` and `.bin` files of PyTorch that a stranger may have written, looked at before torch unpickles them.

`weights_only=True` runs no program, but allocates what a pickle asks for: `bytearray(6 << 30)` takes a few bytes. So
only torch's zip archives are read, uncompressed and no larger inside than outside, and only such pickles as make
tensors from the archive's own bytes.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from typing import BinaryIO

_START, _END = b"PK\x03\x04", struct.Struct("<4s4H2LH")
_MOST_ENTRIES = 65_000
# Names of a large model's tensors take a few hundred kilobytes.
_PICKLE_BYTES = 16 << 20
_SMALL_ENTRY_BYTES = 4096

_TENSORS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_DICT = "collections OrderedDict"
_STORAGES = {
    f"torch {kind}Storage"
    for kind in (
        *("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
        *("ComplexFloat", "ComplexDouble"),
    )
}
_GLOBALS = _TENSORS | _STORAGES | {_DICT}

_LEAVES = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"), "text"),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), "number"),
    **dict.fromkeys(("NEWTRUE", "NEWFALSE", "NONE"), "number"),
    **{"EMPTY_TUPLE": "nothing", "EMPTY_DICT": "dict", "EMPTY_LIST": "list", "MARK": "mark"},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What may be named again; containers that were shared could be deeper than the pickle is long.
_SHARED = {"text", "number", "tensor"}


class NotTensorsError(ValueError):
    """A pickle that holds more than tensors."""

    def __init__(self) -> None:
        super().__init__("it holds more than tensors, which could run any program, and is not opened")


def check_archive(file: BinaryIO) -> None:
    """Look at an archive of PyTorch; the file is at its start afterwards.

    Raises ValueError for a file that is none, or whose declared sizes are not those of the file, and NotTensorsError
    for one that holds more than tensors, dicts, lists, texts and numbers.
    """
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = _check_entries(archive, file.seek(0, 2))
            for entry in pickles:
                check_pickle(archive.read(entry))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error) as error:
        raise ValueError(f"its archive is damaged ({error})") from None
    file.seek(0)


def _check_directory(file: BinaryIO) -> None:
    """Bound what Python's zipfile would read; and a comment could hide a second directory."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(len(_START))
    file.seek(max(0, size - _END.size))
    end = file.read(_END.size)
    if start != _START or len(end) < _END.size or not end.startswith(b"PK\x05\x06"):
        raise ValueError(
            "it is no archive of torch.save, or is in the form from before PyTorch 1.6; save it again"
        )
    _, _, _, _, entries, num_bytes, _, comment = _END.unpack(end)
    if comment or entries > _MOST_ENTRIES or num_bytes > _PICKLE_BYTES:
        raise ValueError("the list of its archive's entries is too long")
    file.seek(0)


def _check_entries(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """Raise ValueError for entries that are not in the file as declared; returns the pickle, which is one."""
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise ValueError(f"{unpacked} bytes, unpacked, in a file of {size}")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise ValueError("its archive is compressed or encrypted, which torch.save never does")
    if any(entry.compress_size != entry.file_size for entry in entries):
        raise ValueError("an entry of its archive declares two sizes")
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise ValueError("its archive holds a name twice")
    places = sorted((entry.header_offset, entry.file_size) for entry in entries)
    ends = [*(start for start, _ in places[1:]), archive.start_dir]
    if any(start + 30 + length > end for (start, length), end in zip(places, ends, strict=True)):
        raise ValueError("entries of its archive overlap")
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if len(pickles) != 1 or pickles[0].filename.rpartition("/")[2] != "data.pkl":
        raise ValueError("its archive holds no pickle of torch.save, or several")
    if pickles[0].file_size > _PICKLE_BYTES:
        raise ValueError(f"a pickle of {pickles[0].file_size} bytes")
    return pickles


def check_pickle(content: bytes) -> None:
    """Follow a pickle without doing what it says. Raises ValueError or NotTensorsError.

    Only tensors of the archive's storages are made, only texts are keys, and no container is in two places: time and
    memory that loading takes are then proportional to the file's size.
    """
    stack: list[str] = []
    memo: dict[int, str] = {}
    try:
        for operation, argument, _ in pickletools.genops(content):
            _follow(operation.name, argument, stack, memo)
    except NotTensorsError:
        raise
    except (IndexError, KeyError, StopIteration, ValueError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({error})") from None


def _follow(name: str, argument: object, stack: list[str], memo: dict[int, str]) -> None:
    """One operation: kinds of values in place of the values."""
    if name in _LEAVES:
        stack.append(_LEAVES[name])
    elif name in ("PROTO", "STOP"):
        pass
    elif name == "GLOBAL":
        if argument not in _GLOBALS:
            raise NotTensorsError
        stack.append(str(argument))
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[int(str(argument))] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        kind = memo[int(str(argument))]
        if kind not in _SHARED | _GLOBALS:
            raise NotTensorsError
        stack.append(kind)
    elif name in _TUPLES or name == "TUPLE":
        _ = _popped(stack, _TUPLES.get(name))
        stack.append("tuple")
    elif name == "BINPERSID":
        _expect(stack.pop(), "tuple")
        stack.append("storage")
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        if function == _DICT:
            _expect(arguments, "nothing")
        elif function in _TENSORS:
            _expect(arguments, "tuple")
        else:
            raise NotTensorsError
        stack.append("dict" if function == _DICT else "tensor")
    elif name in ("SETITEM", "SETITEMS"):
        items = _popped(stack, 2 if name == "SETITEM" else None)
        _expect(stack[-1], "dict")
        for key in items[::2]:
            _expect(key, "text")
    elif name in ("APPEND", "APPENDS"):
        _ = _popped(stack, 1 if name == "APPEND" else None)
        _expect(stack[-1], "list")
    elif name == "BUILD":
        _expect(stack.pop(), "dict")
        _expect(stack[-1], "dict")
    else:
        raise NotTensorsError


def _popped(stack: list[str], count: int | None) -> list[str]:
    """The last values, or those from the last mark on, which goes too."""
    start = len(stack) - count if count is not None else _last_mark(stack)
    if start < 0:
        raise IndexError
    values = stack[start:]
    del stack[start:]
    if count is None:
        return values[1:]
    if "mark" in values:
        raise IndexError
    return values


def _last_mark(stack: list[str]) -> int:
    return next(place for place in range(len(stack) - 1, -1, -1) if stack[place] == "mark")


def _expect(kind: str, wanted: str) -> None:
    if kind != wanted:
        raise NotTensorsError
