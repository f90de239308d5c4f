"""Checkpoints: all that a run needs to go on as if it had never stopped.

    <job>/checkpoints/step-000050/state.safetensors    parameters, optimiser moments, random states
    <job>/checkpoints/step-000050/state.json           step, the run's fingerprint, the other file's sha256

A checkpoint is written under another name and renamed when it is on the disk. One that is torn nevertheless
(a full disk, a power cut) does not have the digest that it says, and the one before it is used. The order of
the data and the learning rates are functions of seed and step, so the step stands for both.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from okavango.platform.bundle import file_sha256
from okavango.platform.errors import ConflictError, IntegrityError
from okavango.training.mirror import Mirror

_TENSORS = "state.safetensors"
_STATE = "state.json"
_FOLDER = re.compile(r"step-(\d+)", re.ASCII)
_BEST = "best"
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What was read back; see `restore`. `facts` is what its writer added."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.state["facts"]


class Checkpoints:
    """Those of one job.

    Args:
        fingerprint: a digest over what the run is made of: specification, data, base.
        mirror: where they are kept for other hosts, too.
    """

    def __init__(self, folder: Path, fingerprint: str, mirror: Mirror | None = None) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._mirror = mirror

    def save(
        self,
        step: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        facts: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and remove all but the newest two. Writing a step again replaces it."""
        target = self._folder / f"step-{step:06d}"
        partial = self._folder / ".partial"  # whoever holds the job's lease is the only writer
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        save_file(tensors | _moments(optimizer) | _random_tensors(), partial / _TENSORS)
        state = {
            "step": step,
            "fingerprint": self._fingerprint,
            "sha256": file_sha256(partial / _TENSORS),
            "random": _random_values(),
            "facts": dict(facts),
        }
        (partial / _STATE).write_text(json.dumps(state))
        _flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        self._prune()
        if self._mirror is not None:
            self._mirror.push(target)
        return target

    def save_best(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep the state of the lowest held-out loss, beside the checkpoints that runs go on from."""
        target = self._best(step)
        partial = self._folder / ".partial-best"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
        save_file(tensors, partial / _TENSORS)
        (partial / _STATE).write_text("{}")
        _flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        if self._mirror is not None:
            self._mirror.push(target)

    def forget_best(self, step: int) -> None:
        """Of other steps than this one: once a checkpoint says that this is the best."""
        for folder in self._folder.glob(f"{_BEST}-*"):
            if folder != self._best(step):
                shutil.rmtree(folder, ignore_errors=True)

    def _best(self, step: int) -> Path:
        return self._folder / f"{_BEST}-{step:06d}"

    def load_best(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the best state back. Raises IntegrityError where it is gone."""
        try:
            tensors = load_file(self._best(step) / _TENSORS)
        except (OSError, SafetensorError) as error:
            raise IntegrityError(f"the best state is gone: {error!r}", where=str(self._best(step))) from error
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none.

        Raises:
            ConflictError: it is one of other data, another base or another specification.
        """
        if self._mirror is not None:
            self._mirror.pull(self._folder)
        for folder in reversed(self._folders()):
            checkpoint = _read(folder)
            if checkpoint is None:
                continue
            if checkpoint.state["fingerprint"] != self._fingerprint:
                raise ConflictError(
                    "the data, the base or the specification changed since it was saved",
                    where=str(folder),
                    remedy="put back what it was, or start a new job",
                )
            return checkpoint
        return None

    def _folders(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [path for path in self._folder.glob("step-*") if _FOLDER.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def _prune(self) -> None:
        whole = [folder for folder in self._folders() if (folder / _STATE).is_file()]
        for folder in whole[:-_KEPT]:
            shutil.rmtree(folder, ignore_errors=True)


def restore(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put parameters, optimiser and the random states of torch, numpy and Python back.

    `optimizer` must hold the same parameters in the same order as the one that was saved.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.tensors[name])
    state = optimizer.state_dict()
    state["state"] = _read_moments(checkpoint.tensors)
    optimizer.load_state_dict(state)
    _restore_random(checkpoint)


def _read(folder: Path) -> Checkpoint | None:
    try:
        state = json.loads((folder / _STATE).read_text())
        if file_sha256(folder / _TENSORS) != state["sha256"]:
            return None
        return Checkpoint(state["step"], load_file(folder / _TENSORS), state)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer.{i}.{name}": value.detach().cpu().contiguous()
        for i, moments in optimizer.state_dict()["state"].items()
        for name, value in moments.items()
    }


def _read_moments(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = value
    return moments


def _random_tensors() -> dict[str, Tensor]:
    states = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _random_values() -> dict[str, Any]:
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [algorithm, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def _restore_random(checkpoint: Checkpoint) -> None:
    torch.set_rng_state(checkpoint.tensors["random.torch"])
    cuda = [value for name, value in sorted(checkpoint.tensors.items()) if name.startswith("random.cuda.")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = checkpoint.state["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(checkpoint.state["random"]["numpy"]))


def _flush(folder: Path) -> None:
    """To the disk before the rename, so that a power cut cannot leave a name without its bytes."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
