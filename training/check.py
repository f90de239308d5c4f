"""The line-exact check of a dataset: every fault with file, line and field, before a job takes compute.

Nothing stops at the first fault. Rows are read exactly as training reads them (training.rows), and each
distinct medium is decoded once. A fault keeps a file from training; a warning does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okavango.modalities.content import Fault, Limits, LoadMedia, Media, Message, Modality
from okavango.modalities.image import decode_image
from okavango.platform.errors import DataError, MediaError, PromptError
from okavango.training.dataset import file_fault, media_loader
from okavango.training.rows import read_line, read_row

if TYPE_CHECKING:
    from okavango.modalities.base import Base

KEEP = 10_000
_MOST_TEXT = 500

Advance = Callable[[int], None]
"""Told how many bytes of the file are done so far."""


@dataclass(frozen=True)
class Finding:
    """A fault or a warning and its place. `line` counts from 1, and is None for the file as a whole; `field`
    is a path such as messages[1].content, and "" for the line as a whole."""

    path: Path
    line: int | None
    field: str
    text: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else str(self.path)
        return ": ".join(part for part in (place, self.field, self.text) if part)

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.path), "line": self.line, "field": self.field, "text": self.text}


@dataclass(frozen=True)
class Measure:
    """How a base counts a row. `tokens` raises PromptError for what the base cannot render; `context`: the
    most tokens that a row may have."""

    tokens: Callable[[Sequence[Message]], int]
    context: int


def measure_of(base: Base) -> Measure:
    """Tokens as training counts them: up to the last one that is learned. Loads the tokenizer alone."""
    from okavango.modalities.base import load_tokenizer
    from okavango.modalities.prompt import Renderer

    renderer = Renderer(load_tokenizer(base), {name: head.spec.tokens for name, head in base.heads.items()})

    def tokens(messages: Sequence[Message]) -> int:
        loss = renderer.conversation(messages).loss
        return len(loss) - loss[::-1].index(True)

    return Measure(tokens, base.decoder.context)


@dataclass
class Counts:
    """What was found in a file; tokens only where a base measured them.

    Attributes:
        media_bytes: of distinct media, encoded.
        answer_chars: of all assistants' texts.
        longest: tokens of the longest row.
    """

    rows: int = 0
    faulty_rows: int = 0
    messages: int = 0
    media: int = 0
    distinct_media: int = 0
    media_bytes: int = 0
    answer_chars: int = 0
    tokens: int = 0
    longest: int = 0
    faults: int = 0
    warnings: int = 0


@dataclass(frozen=True)
class Report:
    """The result. `counts` counts all; of faults and warnings the first `keep` are held."""

    path: Path
    counts: Counts
    faults: tuple[Finding, ...]
    warnings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return self.counts.faults == 0

    def require_ok(self) -> None:
        """Raises DataError with the faults that are held, if there are any."""
        if not self.ok:
            raise DataError(
                f"{self.counts.faults:,} faults",
                tuple(map(str, self.faults)),
                where=str(self.path),
                remedy="correct them, and check with: okavango data check",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "ok": self.ok,
            "counts": asdict(self.counts),
            "faults": [finding.to_json() for finding in self.faults],
            "warnings": [finding.to_json() for finding in self.warnings],
        }


Seen = dict[bytes, tuple[Path, int]]
"""Where each conversation stood first. Passed from file to file, it finds rows that two of them share."""


def check_dataset(
    path: Path,
    *,
    allow_files: bool = True,
    limits: Limits | None = None,
    measure: Measure | None = None,
    seen: Seen | None = None,
    keep: int = KEEP,
    progress: Advance = lambda done: None,
) -> Report:
    """Read a JSONL file from its first to its last line, and report all that is wrong with it.

    Args:
        allow_files: whether media may be paths; uploads may hold data URLs only.
        measure: also count tokens, and fault rows over the context.
        seen: conversations of other files; this one's are added.
        keep: how many faults, and how many warnings, the report holds; all are counted.
    """
    path = Path(path)
    limits = limits or Limits()
    check = _Check(path, limits, _Decoded(path.parent, allow_files, limits), measure, keep)
    check.seen = {} if seen is None else seen
    fault = file_fault(path)
    if fault:
        check.add_fault(None, Fault("", fault))
    else:
        check.read(progress)
    return check.report()


@dataclass
class _Check:
    """One file's check while it goes on."""

    path: Path
    limits: Limits
    decoded: _Decoded
    measure: Measure | None
    keep: int
    seen: Seen = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def read(self, progress: Advance) -> None:
        with self.path.open("rb") as file:
            while line := read_line(file, self.limits):
                self.counts.rows += 1
                self._row(line.rstrip(b"\r\n"), self.counts.rows)
                progress(file.tell())

    def report(self) -> Report:
        self.counts.distinct_media = len(self.decoded.verdicts)
        self.counts.media_bytes = self.decoded.bytes
        return Report(self.path, self.counts, tuple(self.faults), tuple(self.warnings))

    def add_fault(self, line: int | None, fault: Fault) -> None:
        self.counts.faults += 1
        if len(self.faults) < self.keep:
            self.faults.append(self._finding(line, fault))

    def add_warning(self, line: int, warning: Fault) -> None:
        self.counts.warnings += 1
        if len(self.warnings) < self.keep:
            self.warnings.append(self._finding(line, warning))

    def _row(self, line: bytes, number: int) -> None:
        messages, faults = read_row(line, self.decoded.load, self.limits)
        self._count(messages)
        if not faults:
            faults = list(self._measured(messages))
            self._compare(messages, number)
        for fault in faults:
            self.add_fault(number, fault)
        self.counts.faulty_rows += bool(faults)

    def _count(self, messages: Sequence[Message]) -> None:
        self.counts.messages += len(messages)
        self.counts.media += sum(len(message.media) for message in messages)
        self.counts.answer_chars += sum(len(m.text) for m in messages if m.role == "assistant")

    def _measured(self, messages: Sequence[Message]) -> Iterator[Fault]:
        if self.measure is None:
            return
        try:
            tokens = self.measure.tokens(messages)
        except PromptError as error:
            yield Fault("messages", str(error))
            return
        self.counts.tokens += tokens
        self.counts.longest = max(self.counts.longest, tokens)
        if tokens > self.measure.context:
            yield Fault("messages", f"{tokens:,} tokens, over the base's context of {self.measure.context:,}")

    def _compare(self, messages: Sequence[Message], number: int) -> None:
        path, line = self.seen.setdefault(_identity(messages), (self.path, number))
        if (path, line) != (self.path, number):
            place = f"line {line}" if path == self.path else f"{path}:{line}"
            self.add_warning(number, Fault("messages", f"the same conversation as {place}"))

    def _finding(self, line: int | None, fault: Fault) -> Finding:
        return Finding(self.path, line, _printable(fault.field), _printable(fault.text))


class _Decoded:
    """Loads media as training does, and decodes each distinct one once."""

    def __init__(self, folder: Path, allow_files: bool, limits: Limits) -> None:
        self.verdicts: dict[str, str | None] = {}
        self.bytes = 0
        self._limits = limits
        self._load: LoadMedia = media_loader(folder, allow_files=allow_files, limits=limits)

    def load(self, url: str, modality: Modality) -> bytes:
        data = self._load(url, modality)
        digest = Media(modality, data).digest
        if digest not in self.verdicts:
            self.verdicts[digest] = self._fault_in(data)
            self.bytes += len(data)
        fault = self.verdicts[digest]
        if fault is not None:
            raise MediaError(fault)
        return data

    def _fault_in(self, data: bytes) -> str | None:
        try:
            decode_image(data, self._limits)
        except MediaError as error:
            return str(error)
        return None


def _identity(messages: Sequence[Message]) -> bytes:
    """What makes two conversations the same: roles, texts, and media by content."""
    digest = hashlib.sha256()
    for message in messages:
        parts = [part.digest if isinstance(part, Media) else part.text for part in message.parts]
        digest.update(repr((message.role, parts)).encode())
    return digest.digest()[:16]


def _printable(text: str) -> str:
    """One short line that does nothing to a terminal, whatever a data file holds."""
    if len(text) > _MOST_TEXT:
        text = text[:_MOST_TEXT] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
