"""A job's losses, scores and samples as TensorBoard's files, beside its events in the catalog.

<home>/tensorboard/<adapter>/<job>/
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from okavango.platform.catalog.events import Event
from okavango.training.monitor import Monitor


@contextmanager
def recorded(monitor: Monitor, folder: Path, steps: int) -> Iterator[None]:
    """Write what the block's run notes. A run that goes on writes another file into the same folder, whose
    steps stand for those of the file before.

    Args:
        steps: where scores at the end are put.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(event: Event) -> None:
        data = dict(event.data or {})
        step = int(data.pop("step", steps))
        match event.kind:
            case "metrics" | "scores":
                for name, value in data.items():
                    writer.add_scalar(f"{event.kind}/{name}", value, step)
            case "sample":
                row = f"{event.message}\n\n**expected** {data['expected']}\n\n**answer** {data['answer']}"
                writer.add_text(f"sample/line {data['line']}", row, step)

    monitor.listeners.append(write)
    try:
        yield
    finally:
        monitor.listeners.remove(write)
        writer.close()
