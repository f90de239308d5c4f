from __future__ import annotations

import pytest
import torch

from okavango.modalities.content import Media, Message, Text
from okavango.modalities.probes import Probe, read_probes, write_probes
from okavango.platform.bundle import PROBES
from okavango.platform.errors import IntegrityError

CONVERSATION = (
    Message("user", (Text("a"), Media("image", b"\x00\x01"), Text("b"), Media("image", b"\x02"))),
    Message("assistant", (Text("c"),)),
)


def test_what_is_written_is_read(tmp_path):
    probes = (
        Probe(CONVERSATION, torch.arange(5), torch.tensor([2, 3]), torch.randn(2, 7), "be kind"),
        Probe(CONVERSATION[1:], torch.arange(3), torch.tensor([1]), torch.randn(1, 7)),
    )
    write_probes(tmp_path, probes)
    for probe, found in zip(probes, read_probes(tmp_path), strict=True):
        assert (found.messages, found.system) == (probe.messages, probe.system)
        for name in ("tokens", "positions", "logits"):
            assert torch.equal(getattr(found, name), getattr(probe, name))


@pytest.mark.parametrize("data", [b"", b"not safetensors at all"])
def test_a_torn_file_is_an_integrity_error(tmp_path, data):
    (tmp_path / PROBES).write_bytes(data)
    with pytest.raises(IntegrityError, match="probe"):
        read_probes(tmp_path)
