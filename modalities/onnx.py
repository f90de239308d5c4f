"""Weights and wiring of an ONNX file: the few fields of the protobuf format that hold them.

Field numbers are those of onnx.proto3 (ModelProto, GraphProto, NodeProto, TensorProto); the wire format is
protobuf's own. Attributes, shapes, external data and types other than float32 are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from okavango.platform.errors import IntegrityError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT = 1  # TensorProto.DataType
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP = 1, 2, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """`weights`: float32 initialisers by name. `nodes`: in topological order."""

    weights: dict[str, Tensor]
    nodes: tuple[Node, ...]


def read_graph(data: bytes) -> Graph:
    """The graph of a serialised ModelProto.

    Raises:
        IntegrityError: the bytes are no ONNX model.
    """
    try:
        (graph,) = (value for field, value in _fields(memoryview(data)) if field == _MODEL_GRAPH)
        parts = list(_fields(_bytes(graph)))
        weights = dict(_weights([_bytes(value) for field, value in parts if field == _GRAPH_INITIALIZER]))
        nodes = tuple(_node(_bytes(value)) for field, value in parts if field == _GRAPH_NODE)
    except (ValueError, IndexError) as error:
        raise IntegrityError(f"not an ONNX model: {error}") from error
    return Graph(weights, nodes)


def _weights(tensors: list[memoryview]) -> Iterator[tuple[str, Tensor]]:
    for tensor in tensors:
        dims: list[int] = []
        name, kind, raw = "", 0, memoryview(b"")
        for field, value in _fields(tensor):
            if field == _TENSOR_DIMS:
                dims += [value] if isinstance(value, int) else _packed(value)
            elif field == _TENSOR_TYPE and isinstance(value, int):
                kind = value
            elif field == _TENSOR_NAME:
                name = _text(value)
            elif field == _TENSOR_RAW:
                raw = _bytes(value)
        if kind == _FLOAT and raw:
            yield name, torch.from_numpy(np.frombuffer(raw, "<f4").reshape(dims).copy())


def _node(data: memoryview) -> Node:
    fields = list(_fields(data))
    inputs, outputs, op = (
        tuple(_text(value) for field, value in fields if field == wanted)
        for wanted in (_NODE_INPUT, _NODE_OUTPUT, _NODE_OP)
    )
    return Node(op[0], inputs, outputs)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) pairs of one message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"an endless number at byte {at}")


def _packed(data: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError(f"the number {value} where bytes are expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()
