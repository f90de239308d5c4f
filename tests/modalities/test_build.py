import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from okavango.modalities.base import Base, list_bases, load_decoder, load_head, read_base
from okavango.modalities.build import (
    DecoderShape,
    building,
    default_tokens,
    quiet_transformers,
    write_description,
    write_head,
)
from okavango.modalities.projector import HeadSpec
from okavango.platform.errors import ConfigError, ConflictError

# Writes half a base, says so, and waits to be killed.
BUILDER = """
import sys, time
from pathlib import Path
from okavango.modalities.build import building
with building(Path(sys.argv[1]), "b") as draft:
    (draft / "base.toml").write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""
# Builds when told, taking a while.
RACER = """
import sys, time
from pathlib import Path
from okavango.modalities.build import building
from okavango.platform.errors import ConflictError
sys.stdin.readline()
try:
    with building(Path(sys.argv[1]), "b") as draft:
        for name in ("one", "base.toml"):
            (draft / name).write_text(sys.argv[2])
            time.sleep(0.2)
    print("built")
except ConflictError:
    print("taken")
"""


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def fail_midway(draft: Path) -> None:
    (draft / "base.toml").write_text("half")
    raise RuntimeError("midway")


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob("*.draft"))


def test_a_base_appears_when_it_is_whole(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    with building(bases, "b") as draft:
        (draft / "base.toml").write_text("whole")
        assert visible(bases) == []
    assert (bases / "b" / "base.toml").read_text() == "whole"
    assert not drafts(bases)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), building(tmp_path, "b") as draft:
        fail_midway(draft)
    assert visible(tmp_path) == []
    assert not drafts(tmp_path)


def test_a_taken_name_is_refused_and_kept(tmp_path: Path) -> None:
    with building(tmp_path, "b") as draft:
        (draft / "base.toml").write_text("first")
    with pytest.raises(ConflictError, match="--force"), building(tmp_path, "b"):
        pass
    assert (tmp_path / "b" / "base.toml").read_text() == "first"


def test_force_replaces_and_a_failed_replacement_keeps_the_old(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with building(tmp_path, "b", force=True) as draft:
            (draft / text).write_text(text)
    assert visible(tmp_path / "b") == ["second"]
    with pytest.raises(RuntimeError, match="midway"), building(tmp_path, "b", force=True) as draft:
        fail_midway(draft)
    assert visible(tmp_path / "b") == ["second"]


def test_a_finished_base_can_be_read_by_others(tmp_path: Path) -> None:
    with building(tmp_path, "b") as draft:
        (draft / "weights").write_text("w")
        (draft / "weights").chmod(0o600)
    assert (tmp_path / "b" / "weights").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "b").stat().st_mode & 0o055 == 0o055


@pytest.mark.parametrize("name", ["", ".b", "../b", "a/b", "a b", "-b", "B", "a@1", "x" * 65])
def test_a_name_that_is_no_folder_or_model_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a base"), building(tmp_path, name):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_builder_leaves_is_no_base_and_goes_with_the_next_build(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "half\n"
        os.kill(builder.pid, signal.SIGKILL)
    assert len(drafts(tmp_path)) == 1
    assert list_bases(tmp_path) == ()
    with building(tmp_path, "b") as draft:
        (draft / "base.toml").write_text("whole")
    assert not drafts(tmp_path)
    assert visible(tmp_path) == ["b"]


def test_of_two_builders_at_once_one_builds_and_the_other_finds_it_built(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mark in ("x", "y")
    ]
    outputs = [racer.communicate("go\n")[0].strip() for racer in racers]
    assert sorted(outputs) == ["built", "taken"]
    built = {(tmp_path / "b" / name).read_text() for name in ("one", "base.toml")}
    assert built == {"x" if outputs[0] == "built" else "y"}
    assert not drafts(tmp_path)


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [((16, 16), 16), ((4, 4), 16), ((7, 7), 1), ((14, 14), 4), ((24, 24), 16), ((9, 6), 9)],
)
def test_default_tokens_tile_the_grid(grid: tuple[int, int], tokens: int) -> None:
    assert default_tokens(grid) == tokens


def test_a_decoder_elsewhere_is_named_by_its_absolute_path(tiny_base: Base, tmp_path: Path) -> None:
    write_description(tmp_path, "far", tiny_base.decoder.path, tiny_base.decoder.context)
    found = read_base(tmp_path)
    assert found.decoder == tiny_base.decoder
    assert found.encoders == {}


def test_a_described_head_is_the_one_that_was_written(tiny_base: Base, tmp_path: Path) -> None:
    shape = DecoderShape.of(load_decoder(tiny_base, torch.float32))
    encoder = tiny_base.encoders["image"]
    spec = HeadSpec(encoder.width, shape.width, encoder.grid, tokens=16, hidden=8)
    head = write_head(tmp_path / "h.safetensors", spec, shape)
    assert (head.spec.in_width, head.spec.out_width, head.spec.grid) == (32, 64, (4, 4))
    assert not head.trained
    loaded = load_head(head)(torch.randn(8, 16, 32))
    assert loaded.std().item() == pytest.approx(shape.embedding_std, rel=0.1)


def test_quiet_transformers_gives_the_old_settings_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
