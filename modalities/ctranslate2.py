"""Variables of a CTranslate2 model file: named arrays, and other names for some of them.

The layout (version 6, all numbers little-endian) is what `Model._serialize` of CTranslate2 writes: version,
the model's kind, its revision, the variables, then the aliases. A string has a u16 length, which counts the
NUL at its end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from okavango.platform.errors import IntegrityError

VERSION = 6
_DTYPES = ("<f4", "|i1", "<i2", "<i4", "<f2")  # by CTranslate2's number
_BFLOAT16 = 5


@dataclass(frozen=True)
class Model:
    """`kind`: what CTranslate2 calls the model, such as WhisperSpec.
    `variables`: by name, aliases among them, in the type that the file has."""

    kind: str
    revision: int
    variables: dict[str, Tensor]


def read_model(data: bytes) -> Model:
    """The model in the bytes of a model.bin.

    Raises:
        IntegrityError: torn, longer than it says, or of another layout or version.
    """
    cursor = _Cursor(memoryview(data))
    try:
        model = _model(cursor)
        cursor.end()
    except ValueError as error:
        raise IntegrityError(f"not a whole CTranslate2 model of version {VERSION}: {error}") from error
    return model


def _model(cursor: _Cursor) -> Model:
    if (version := cursor.number("<I")) != VERSION:
        raise ValueError(f"its version is {version}")
    kind, revision = cursor.text(), cursor.number("<I")
    variables = dict(_variables(cursor, cursor.number("<I")))
    for _ in range(cursor.number("<I")):
        alias, name = cursor.text(), cursor.text()
        if name not in variables:
            raise ValueError(f"{alias} is another name of {name}, which is not there")
        _add(variables, alias, variables[name])
    return Model(kind, revision, variables)


def _variables(cursor: _Cursor, count: int) -> Iterator[tuple[str, Tensor]]:
    seen: dict[str, Tensor] = {}
    for _ in range(count):
        name = cursor.text()
        _add(seen, name, _variable(cursor, name))
    yield from seen.items()


def _add(variables: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in variables:
        raise ValueError(f"{name} is there twice")
    variables[name] = tensor


def _variable(cursor: _Cursor, name: str) -> Tensor:
    shape = [cursor.number("<I") for _ in range(cursor.number("<B"))]
    kind, size = cursor.number("<B"), cursor.number("<I")
    if kind not in (*range(len(_DTYPES)), _BFLOAT16):
        raise ValueError(f"{name} is of the unknown type {kind}")
    dtype = np.dtype("<i2" if kind == _BFLOAT16 else _DTYPES[kind])
    if size != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {size} bytes, but shape {shape} of {dtype.itemsize} bytes each")
    array = np.frombuffer(cursor.bytes(size), dtype).reshape(shape).copy()
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if kind == _BFLOAT16 else tensor


class _Cursor:
    """Reads on from where it stands. Raises ValueError where the bytes end before."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def bytes(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._data):
            raise ValueError(f"{size} bytes are missing at byte {self._at} of {len(self._data)}")
        found, self._at = self._data[self._at : end], end
        return found

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.bytes(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        at = self._at
        raw = bytes(self.bytes(self.number("<H")))
        if raw[-1:] != b"\0" or b"\0" in raw[:-1]:
            raise ValueError(f"no name stands at byte {at}")
        return raw[:-1].decode()

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes follow its end")
