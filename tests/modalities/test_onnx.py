"""The reader against messages written by hand, field by field, as protobuf's encoding describes them."""

import struct

import pytest
import torch

from okavango.modalities.onnx import Node, read_graph
from okavango.platform.errors import IntegrityError

FLOAT, DOUBLE = 1, 11


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def chunk(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def tensor(
    name: str, values: list[float], dims: list[int], *, packed: bool = False, kind: int = FLOAT
) -> bytes:
    shape = chunk(1, b"".join(map(varint, dims))) if packed else b"".join(number(1, dim) for dim in dims)
    raw = struct.pack(f"<{len(values)}f", *values)
    return shape + number(2, kind) + chunk(8, name.encode()) + chunk(9, raw)


def node(op: str, inputs: list[str], outputs: list[str]) -> bytes:
    parts = [chunk(1, name.encode()) for name in inputs] + [chunk(2, name.encode()) for name in outputs]
    return b"".join(parts) + chunk(3, b"a name") + chunk(4, op.encode())


def model(*graph: bytes) -> bytes:
    # Around the graph lie fields that are not read, of every wire type.
    fixed = varint(20 << 3 | 1) + bytes(8) + varint(21 << 3 | 5) + bytes(4)
    return number(1, 8) + chunk(2, b"an exporter") + fixed + chunk(7, b"".join(graph)) + number(5, 300)


def test_weights_and_nodes_are_read_in_order() -> None:
    graph = read_graph(
        model(
            chunk(1, node("MatMul", ["x", "w"], ["y"])),
            chunk(5, tensor("w", [1, 2, 3, 4, 5, 6], [2, 3])),
            chunk(5, tensor("b", [0.5, -0.5], [2], packed=True)),
            chunk(1, node("Add", ["b", "y"], ["z"])),
        )
    )
    assert graph.nodes == (Node("MatMul", ("x", "w"), ("y",)), Node("Add", ("b", "y"), ("z",)))
    assert torch.equal(graph.weights["w"], torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert torch.equal(graph.weights["b"], torch.tensor([0.5, -0.5]))


def test_large_dimensions_take_more_than_one_byte() -> None:
    graph = read_graph(model(chunk(5, tensor("w", [0.0] * 300, [300, 1]))))
    assert graph.weights["w"].shape == (300, 1)


def test_tensors_of_other_types_are_left_out() -> None:
    assert read_graph(model(chunk(5, tensor("w", [1, 2], [1], kind=DOUBLE)))).weights == {}


def test_the_weights_do_not_share_the_file_s_memory() -> None:
    data = bytearray(model(chunk(5, tensor("w", [1.0], [1]))))
    graph = read_graph(bytes(data))
    graph.weights["w"].add_(1)
    assert graph.weights["w"].item() == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a model at all",
        b"\xff" * 32,
        number(1, 8),
        model(chunk(5, tensor("w", [1, 2, 3], [3])))[:-8],
        model(chunk(5, tensor("w", [1, 2, 3], [4]))),
        chunk(7, number(5, 3)),
        chunk(7, chunk(1, chunk(1, b"x"))),
    ],
    ids=["empty", "text", "ones", "no graph", "torn", "wrong shape", "number for a tensor", "no op"],
)
def test_what_is_no_model_is_a_clear_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="not an ONNX model"):
        read_graph(data)
