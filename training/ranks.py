"""Several processes that take a job's steps together, by Accelerate: gloo between CPUs, NCCL between GPUs.

One leads. It alone reads the job's state, judges, writes checkpoints and publishes; at each step it sends the
others what has been learned, every process computes the gradients of its share of the step's rows, and the
leader adds them up. So the others keep nothing that a checkpoint would have to hold. Each process holds the
whole base.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list, reduce
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from okavango.platform.config import Settings, environment_of, overlaid
from okavango.platform.errors import NotReadyError

Item = TypeVar("Item")
_PATIENCE = timedelta(days=1)  # the leader may judge, or encode, for hours
_POLL_SECONDS = 0.05
_DYING_SECONDS = 2.0
_HOST = "127.0.0.1"


class Ranks:
    """This process among those of its run; alone, each of these does nothing."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank = accelerator.process_index
        self.size = accelerator.num_processes
        self._device = accelerator.device

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of a batch that this process computes; there may be none."""
        return items[self.rank :: self.size]

    def tell(self, word: Any) -> Any:
        """The leader's word, to all."""
        if self.size == 1:
            return word
        told = [word]
        broadcast_object_list(told)
        return told[0]

    def send(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all processes the leader's parameters."""
        if self.size == 1:
            return
        own = [parameter.data for parameter in parameters]
        flat = broadcast(torch.cat([each.flatten() for each in own]))
        _scatter(flat, own)

    def add_up(self, parameters: Iterable[nn.Parameter], loss: float) -> float:
        """Give each parameter the sum of all processes' gradients, where any has one; the sum of losses."""
        if self.size == 1:
            return loss
        own = list(parameters)
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in own]
        has = torch.tensor([float(each.grad is not None) for each in own], device=self._device)
        ends = [has, torch.tensor([loss], device=self._device)]
        flat = reduce(torch.cat([*(each.flatten() for each in found), *ends]), reduction="sum")
        _scatter(flat, found)
        for parameter, gradient, any_has in zip(own, found, flat[-len(own) - 1 : -1].tolist(), strict=True):
            parameter.grad = gradient if any_has else None
        return float(flat[-1])


def _scatter(flat: Tensor, targets: Sequence[Tensor]) -> None:
    done = 0
    for target in targets:
        target.copy_(flat[done : done + target.numel()].view_as(target))
        done += target.numel()


@dataclass(frozen=True)
class Seat:
    """A process's place in a run: its number, how many there are, where they meet, and its threads."""

    rank: int
    size: int
    port: int
    threads: int

    def environment(self) -> dict[str, str]:
        """As Accelerate looks for it."""
        numbers = {"RANK": self.rank, "LOCAL_RANK": self.rank, "OMP_NUM_THREADS": self.threads}
        numbers |= {"WORLD_SIZE": self.size, "LOCAL_WORLD_SIZE": self.size, "MASTER_PORT": self.port}
        return {"MASTER_ADDR": _HOST, **{name: str(number) for name, number in numbers.items()}}

    def command(self, job: str) -> list[str]:
        numbers = (self.rank, self.size, self.port, self.threads)
        return [sys.executable, "-m", "okavango.training.rank", job, *map(str, numbers)]


def join() -> Accelerator:
    """Accelerate's device, backward and clipping. Precision is the model's own matter."""
    return Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())


def take(seat: Seat) -> Accelerator:
    """Join a run as one of its further processes, which has that seat in its environment."""
    torch.set_num_threads(seat.threads)
    _meet(TCPStore(_HOST, seat.port, is_master=False, timeout=_PATIENCE), seat)
    return join()


@contextmanager
def joined(processes: int, settings: Settings, job: str) -> Iterator[Accelerator]:
    """Within, so many processes work on a job, of which this one leads; the others end with the block.

    Raises:
        NotReadyError: one of them died.
    """
    if processes == 1:
        yield join()
        return
    threads = torch.get_num_threads()
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    seats = [Seat(rank, processes, store.port, max(1, threads // processes)) for rank in range(processes)]
    others = [_start(seat, job, settings) for seat in seats[1:]]
    _forget()  # that this process was alone before
    try:
        with overlaid(seats[0].environment()):
            _await(store, others)
            torch.set_num_threads(seats[0].threads)
            _meet(store, seats[0])
            accelerator = join()
            assert accelerator.num_processes == processes
            yield accelerator
    except RuntimeError as error:  # what torch makes of a connection that has closed
        _refuse_death(others, error, _DYING_SECONDS)
        raise
    finally:
        _end(others)
        _leave()
        torch.set_num_threads(threads)


def _start(seat: Seat, job: str, settings: Settings) -> subprocess.Popen[bytes]:
    return subprocess.Popen(seat.command(job), env={**environment_of(settings), **seat.environment()})


def _await(store: TCPStore, others: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have come, since meeting waits for ever for one that has died on its way."""
    coming = [f"rank {rank}" for rank in range(1, len(others) + 1)]
    while not store.check(coming):
        _refuse_death(others)
        time.sleep(_POLL_SECONDS)


def _meet(store: TCPStore, seat: Seat) -> None:
    store.set(f"rank {seat.rank}", "is here")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=seat.rank, world_size=seat.size, timeout=_PATIENCE
    )


def _refuse_death(
    others: Sequence[subprocess.Popen[bytes]], error: Exception | None = None, seconds: float = 0
) -> None:
    """`seconds`: to wait for one that is dying, whose connections close before it has an exit code."""
    until = time.monotonic() + seconds
    while True:
        for other in others:
            if other.poll() not in (None, 0):
                message = f"a process of the job ended by exit code {other.returncode}"
                raise NotReadyError(message, remedy="what it printed says why") from error
        if time.monotonic() >= until:
            return
        time.sleep(_POLL_SECONDS)


def _end(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """At once: they have nothing to lose."""
    for other in others:
        other.kill()
        other.wait()


def _leave() -> None:
    """Be one process again, for whatever comes after the run."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
