"""The reader against files written by hand, number by number, as CTranslate2 lays them out."""

import struct

import pytest
import torch

from okavango.modalities.ctranslate2 import read_model
from okavango.platform.errors import IntegrityError

FLOAT, INT8, INT16, INT32, HALF, BFLOAT = range(6)


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name: str, shape: tuple[int, ...], kind: int, raw: bytes) -> bytes:
    dims = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return text(name) + dims + struct.pack("<BI", kind, len(raw)) + raw


def model(*variables: bytes, aliases: tuple[tuple[str, str], ...] = (), version: int = 6) -> bytes:
    head = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    tail = b"".join(text(alias) + text(name) for alias, name in aliases)
    return head + b"".join(variables) + struct.pack("<I", len(aliases)) + tail


WEIGHT = variable("w", (2, 3), HALF, struct.pack("<6e", 1, 2, 3, 4, 5, 6))


def test_variables_keep_their_shape_and_type() -> None:
    found = read_model(
        model(
            WEIGHT,
            variable("f", (2,), FLOAT, struct.pack("<2f", 0.1, -3)),
            variable("heads", (), INT16, struct.pack("<h", 6)),
            variable("tiny", (1,), INT8, b"\xff"),
            variable("large", (1,), INT32, struct.pack("<i", -70_000)),
            variable("b", (2,), BFLOAT, struct.pack("<2H", 0x3F80, 0xC000)),
        )
    )
    assert (found.kind, found.revision) == ("WhisperSpec", 3)
    assert torch.equal(found.variables["w"], torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float16))
    assert torch.equal(found.variables["f"], torch.tensor([0.1, -3.0]))
    assert torch.equal(found.variables["b"], torch.tensor([1, -2], dtype=torch.bfloat16))
    assert [found.variables[name].item() for name in ("heads", "tiny", "large")] == [6, -1, -70_000]


def test_an_alias_is_another_name_of_the_same_variable() -> None:
    found = read_model(model(WEIGHT, aliases=(("also", "w"), ("third", "also")))).variables
    assert found["also"] is found["w"] is found["third"]


def test_the_variables_do_not_share_the_file_s_memory() -> None:
    data = model(WEIGHT)
    read_model(data).variables["w"].zero_()
    assert read_model(data).variables["w"][1, 2] == 6


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "4 bytes are missing at byte 0"),
        (b"not a model at all", "its version is"),
        (model(WEIGHT, version=5), "its version is 5"),
        (model(WEIGHT)[:-8], "missing"),
        (model(WEIGHT) + b"\0", "1 bytes follow its end"),
        (model(WEIGHT, WEIGHT), "w is there twice"),
        (model(WEIGHT, aliases=(("w", "w"),)), "w is there twice"),
        (model(WEIGHT, aliases=(("also", "v"),)), "v, which is not there"),
        (model(variable("w", (1,), 9, b"1234")), "unknown type 9"),
        (model(variable("w", (2,), FLOAT, b"1234")), "4 bytes, but shape"),
        (model(variable("w", (2**32 - 1,) * 255, INT8, b"1")), "1 bytes, but shape"),
        (model(variable("w\0w", (), INT8, b"1")), "no name stands at byte"),
        (model(variable("\ud7ff", (), INT8, b"1").replace(b"\xed", b"\xff")), "no name stands|decode"),
    ],
    ids=[
        *("empty", "text", "version 5", "torn", "longer", "twice", "taken alias", "lost alias", "type"),
        *("size", "huge", "name", "not UTF-8"),
    ],
)
def test_what_is_no_model_is_a_clear_error(data: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=f"not a whole CTranslate2 model of version 6: .*({reason})"):
        read_model(data)


def test_a_file_cut_off_anywhere_is_a_clear_error() -> None:
    data = model(WEIGHT, aliases=(("also", "w"),))
    for end in range(len(data)):
        with pytest.raises(IntegrityError):
            read_model(data[:end])
