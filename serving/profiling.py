"""Where a step's time goes: phases for the metrics, and on demand a trace of the next steps.

A trace shows torch's operators, and the phases around them: native kernels are no operators of torch.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from okavango.platform.errors import ConflictError, OkavangoError
from okavango.platform.telemetry import Metrics


@contextmanager
def phase(name: str, metrics: Metrics) -> Iterator[None]:
    """A part of a step, in the metrics and in traces. A GPU's work is waited for where its result is read, in
    `sample`."""
    began = time.perf_counter()
    with record_function(f"okavango.{name}"):
        yield
    metrics.count("okavango_phase_seconds_total", time.perf_counter() - began, phase=name)


class StepProfiler:
    """Traces the next steps when asked to. What torch's profiler sees belongs to the thread that started it,
    so the step thread starts and stops it, around steps; everybody else waits for the result."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: _Trace | None = None

    def request(self, steps: int) -> Future[profile]:
        """A trace of that many steps, once they have run. Cancel it to give it up.

        Raises:
            ConflictError: one is being taken, or was given up and the engine has not run since.
        """
        with self._lock:
            if self._wanted is not None:
                raise ConflictError("a trace is being taken already", remedy="ask again after the next step")
            self._wanted = _Trace(steps)
            return self._wanted.result

    def run(self, step: Callable[[], None]) -> None:
        """Run a step, traced where that is wanted. Called by the step thread alone."""
        trace = self._wanted
        if trace is None:
            step()
            return
        if not trace.result.cancelled():
            trace.run(step)
        else:
            trace.left = 0
            step()
        if trace.left == 0:
            self._wanted = None
            trace.finish()


class _Trace:
    """`left`: steps that are still to be traced."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.result: Future[profile] = Future()
        self._profile: profile | None = None

    def run(self, step: Callable[[], None]) -> None:
        if self._profile is None:
            self._start()
        with record_function("okavango.step"):
            step()
        self.left = max(0, self.left - 1)

    def finish(self) -> None:
        """Hand the trace over. A profiler that fails must not end the step thread."""
        if self._profile is None:
            return
        try:
            self._profile.stop()
        except Exception as error:
            self._fail(error)
            return
        with suppress(InvalidStateError):  # given up meanwhile
            self.result.set_result(self._profile)

    def _start(self) -> None:
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        found = profile(activities=[ProfilerActivity.CPU, *gpu])
        try:
            found.start()
        except Exception as error:
            self._fail(error)
            self.left = 0
            return
        self._profile = found

    def _fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.result.set_exception(OkavangoError(f"torch's profiler failed: {error}"))


def chrome_trace(found: profile) -> bytes:
    """The trace as JSON that chrome://tracing and Perfetto open. Takes time: not on the step thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return path.read_bytes()
