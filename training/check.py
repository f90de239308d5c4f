"""The exact check of a dataset: every fault with file, line and field, before a job takes compute.

Nothing stops at the first fault. Rows are read exactly as training reads them (training.dataset), and each
distinct medium is decoded once. A fault keeps data from training; a warning does not.

However many rows there are, memory stays small: 30 to 60 bytes a row and a distinct medium (training.digests)
for what was seen before, and sums. Faults and warnings are held up to `keep`, and counted beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from okavango.modalities.content import Fault, Limits, Message
from okavango.platform.errors import DataError, PromptError
from okavango.training.archives import ArchiveLimits
from okavango.training.dataset import Dataset, ReadUpload, identity, open_dataset
from okavango.training.measure import Measure as Measure
from okavango.training.measure import measure_of as measure_of
from okavango.training.memory import Estimate, Length
from okavango.training.report import Counts, Finding, Place, Report
from okavango.training.seen import SHOWN, DecodedMedia
from okavango.training.seen import Seen as Seen
from okavango.training.sources.source import Location, Raw
from okavango.training.spread import Spread

KEEP = 10_000
_MOST_TEXT = 500

Advance = Callable[[int], None]
"""Told how many bytes of the data are done so far."""


def check_dataset(
    path: Path,
    *,
    form: str | None = None,
    allow_files: bool = True,
    uploads: ReadUpload | None = None,
    limits: Limits | None = None,
    measure: Measure | None = None,
    seen: Seen | None = None,
    keep: int = KEEP,
    progress: Advance = lambda done: None,
    cache: Path | None = None,
    archive_limits: ArchiveLimits | None = None,
) -> Report:
    """Read data from the first to the last row, and report all that is wrong with them.

    Args:
        measure: also count tokens, and fault rows over the context.
        seen: conversations of other files; this one's are added.
        keep: how many faults, and how many warnings, the report holds; all are counted.
        form, allow_files, uploads, cache, archive_limits: as open_dataset.

    Raises:
        ConfigError: there is no such format.
    """
    try:
        dataset = open_dataset(
            path,
            form=form,
            allow_files=allow_files,
            uploads=uploads,
            limits=limits or Limits(),
            cache=cache,
            archive_limits=archive_limits,
        )
    except DataError as error:
        text = error.message + (f" ({error.remedy})" if error.remedy else "")
        where = Path(error.where) if error.where else Path(path)
        return Report(Path(path), Counts(faults=1), (Finding(where, None, "", _printable(text)),), ())
    check = _Check(dataset, measure, keep, Seen() if seen is None else seen)
    check.read(progress)
    return check.report()


@dataclass
class _Check:
    """One file's check while it goes on."""

    dataset: Dataset
    measure: Measure | None
    keep: int
    seen: Seen
    counts: Counts = field(default_factory=Counts)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.decoded = DecodedMedia(self.dataset.reader.load_media, self.dataset.limits)
        self.reader = replace(self.dataset.reader, load_media=self.decoded.load)
        self.tokens = Spread(max(SHOWN, self.measure.batch_size if self.measure else 0))

    def read(self, progress: Advance) -> None:
        self.seen.begin(self.dataset)
        for column in sorted(self.dataset.reader.unused):
            self.add_warning(None, Fault(column, "is a column that is not used"))
        for i, (raw, done) in enumerate(self.dataset.source.rows()):
            self.counts.rows += 1
            self._row(raw, i)
            progress(done)
        fault = self.dataset.source.fault()
        if fault is None and not self.counts.rows:
            fault = "there are no rows"
        if fault is not None:
            self.add_fault(None, Fault("", fault))

    def report(self) -> Report:
        self.counts.distinct_media = len(self.decoded.known)
        self.counts.media_bytes = self.decoded.bytes
        longest = self.tokens.largest()
        return Report(
            self.dataset.path,
            self.counts,
            tuple(self.faults),
            tuple(self.warnings),
            format=self.dataset.format,
            tokens=self.tokens.summary(),
            longest=tuple(self._place(each.row, each.size) for each in longest[:SHOWN]),
            media=self.decoded.summaries(),
            largest_media=tuple(self._place(row, size) for size, row in self.decoded.largest()),
            memory=self._memory([Length(each.size, each.other) for each in longest]),
        )

    def add_fault(self, row: int | None, fault: Fault) -> None:
        self.counts.faults += 1
        if len(self.faults) < self.keep:
            self.faults.append(self._finding(row, fault))

    def add_warning(self, row: int | None, warning: Fault) -> None:
        self.counts.warnings += 1
        if len(self.warnings) < self.keep:
            self.warnings.append(self._finding(row, warning))

    def _row(self, raw: Raw, i: int) -> None:
        self.decoded.row = i + 1
        messages, faults = self.reader.read(raw)
        self._count(messages)
        if not faults:
            faults = list(self._measured(messages, i))
            self._compare(messages, i)
        for fault in faults:
            self.add_fault(i, fault)
        self.counts.faulty_rows += bool(faults)

    def _count(self, messages: Sequence[Message]) -> None:
        self.counts.messages += len(messages)
        self.counts.media += sum(len(message.media) for message in messages)
        self.counts.answer_chars += sum(len(m.text) for m in messages if m.role == "assistant")

    def _measured(self, messages: Sequence[Message], i: int) -> Iterator[Fault]:
        if self.measure is None:
            return
        conversation = self.reader.form.conversation
        try:
            length = self.measure.length(messages)
        except PromptError as error:
            yield Fault(conversation, str(error))
            return
        self.counts.tokens += length.tokens
        self.counts.longest = max(self.counts.longest, length.tokens)
        self.tokens.add(length.tokens, i + 1, length.answer)
        if length.tokens > self.measure.context:
            most = f"{self.measure.context:,}"
            yield Fault(conversation, f"{length.tokens:,} tokens, over the base's context of {most}")

    def _memory(self, longest: Sequence[Length]) -> Estimate | None:
        if self.measure is None or self.measure.memory is None or not longest:
            return None
        if self.measure.batch_tokens is not None:
            fitting = max(1, self.measure.batch_tokens // longest[0].tokens)
            return self.measure.memory([longest[0]] * min(fitting, self.counts.rows))
        return self.measure.memory(longest[: self.measure.batch_size])

    def _compare(self, messages: tuple[Message, ...], i: int) -> None:
        found = self.seen.earlier(identity(messages), i)
        if found is None:
            return
        dataset, row = found
        location = dataset.source.location(row)
        if dataset is self.dataset:
            place = f"line {location.line}" if location.line == location.row else f"row {location.row}"
        else:
            place = location.within(dataset.path)
        conversation = self.reader.form.conversation
        self.add_warning(i, Fault(conversation, f"the same conversation as {place}"))

    def _location(self, row: int) -> Location:
        return self.dataset.source.location(row)

    def _place(self, row: int, size: int) -> Place:
        """Of a row counted from 1."""
        return Place(row, self._location(row - 1).line, size)

    def _finding(self, row: int | None, fault: Fault) -> Finding:
        location = self._location(row) if row is not None else None
        line, number = (location.line, location.row) if location else (None, None)
        return Finding(self.dataset.path, line, _printable(fault.field), _printable(fault.text), number)


def _printable(text: str) -> str:
    """One short line that does nothing to a terminal, whatever a data file holds."""
    if len(text) > _MOST_TEXT:
        text = text[:_MOST_TEXT] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
