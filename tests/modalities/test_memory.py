"""Pages that are given back are read again when they are needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from okavango.modalities.memory import drop_pages, lazy_zeros

COUNT = 4 << 20  # floats: 16 MiB
MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are there")


def _mapped(path: Path) -> torch.Tensor:
    torch.arange(COUNT, dtype=torch.float32).numpy().tofile(path)
    return torch.from_file(str(path), shared=False, size=COUNT)


def _resident(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that holds a tensor's middle which are in memory."""
    middle, found = tensor.data_ptr() + tensor.nbytes // 2, 0
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(each, 16) for each in first.split("-"))
            is_here = begin <= middle < end
        elif is_here and first == "Rss:":
            found = int(rest[0]) * 1024
    return found


@linux
def test_a_mapped_tensors_pages_go_and_come_back(tmp_path: Path) -> None:
    tensor = _mapped(tmp_path / "weights")
    assert tensor.sum() > 0
    assert _resident(tensor) >= 15 * MIB
    drop_pages(tensor)
    assert _resident(tensor) < MIB
    assert torch.equal(tensor, torch.arange(COUNT, dtype=torch.float32))


@linux
def test_a_neighbours_pages_stay(tmp_path: Path) -> None:
    tensor = _mapped(tmp_path / "weights")
    assert tensor.sum() > 0
    drop_pages(tensor[: COUNT // 4])
    assert 11 * MIB <= _resident(tensor) <= 13 * MIB


def test_what_is_in_no_file_is_left_alone() -> None:
    for tensor in (torch.full((COUNT,), 7.0), lazy_zeros((COUNT,), torch.float32).fill_(7.0)):
        drop_pages(tensor)
        assert torch.all(tensor == 7.0)


@linux
def test_libraries_work_without_the_pages_that_starting_used() -> None:
    program = """
import re
from pathlib import Path
import torch
from okavango.modalities.memory import drop_library_pages

def from_files():
    return int(re.search(r"RssFile:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.randn(64, 64) @ torch.randn(64, 64)
before = from_files()
drop_library_pages()
print(from_files() < before / 4)
import transformers.models.llama.modeling_llama
print(torch.linalg.svdvals(torch.eye(8)).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "8.0"], done.stderr
