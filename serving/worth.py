"""Whether a draft model pays: what its tokens would have taken without it, against what it takes itself.
Plain Python.

All of it is measured as it runs, since it depends on the machine, the batch, the adapters and on what is
talked about. What a step takes is known by its rows, from steps without drafts, too: from the first ones, and
from one now and then. Where drafts do not pay they rest, each time twice as long, and are then tried anew.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from dataclasses import dataclass

log = logging.getLogger(__name__)

_PLAIN = 4  # steps without drafts before the first ones
_PLAIN_EVERY = 32  # of so many steps one goes without
_TRIAL = 16  # steps with drafts before they are judged
_FIRST_REST, _LONGEST_REST = 64, 4096  # steps
_KEEP = 0.95  # of what was gained and spent, a step later
_NEWEST = 0.1  # weight of the newest measurement in a running mean
_REPAYMENT = 1 / 32  # of what is owed for reading, with each step


@dataclass(frozen=True)
class Seen:
    """A step that only went on with answers.

    Attributes:
        rows: tokens that it computed.
        drafted: of these, tokens that the draft model proposed.
        accepted: of these, tokens that were right.
        seconds: what the step took, apart from the draft model.
        draft_seconds: what the draft model took before it; 0 where it was not asked.
    """

    sequences: int
    rows: int
    seconds: float
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0

    @property
    def has_drafts(self) -> bool:
        return self.drafted > 0 or self.draft_seconds > 0


class StepSeconds:
    """What a step of so many rows takes: the mean of the first ones, then a running mean."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._counts: Counter[int] = Counter()

    def add(self, rows: int, seconds: float) -> None:
        self._counts[rows] += 1
        mean = self._means.get(rows, 0.0)
        self._means[rows] = mean + max(_NEWEST, 1 / self._counts[rows]) * (seconds - mean)

    def of(self, rows: int) -> float:
        """Of the nearest number of rows that was seen; some must have been."""
        return self._means[min(self._means, key=lambda seen: abs(seen - rows))]


@dataclass
class Trial:
    """What is known of batches of one size.

    Attributes:
        gained: seconds that the accepted tokens would have taken.
        spent: seconds that they took.
        rest: steps without drafts until they are tried again.
        next_rest: the same, the next time that they do not pay.
    """

    plain: int = 0
    drafted: int = 0
    gained: float = 0.0
    spent: float = 0.0
    rest: int = 0
    next_rest: int = _FIRST_REST

    @property
    def wants_drafts(self) -> bool:
        is_due = (self.plain + self.drafted) % _PLAIN_EVERY == 0
        return self.rest == 0 and self.plain >= _PLAIN and not is_due

    def go_without(self) -> None:
        self.plain += 1
        self.rest = max(0, self.rest - 1)

    def add(self, gained: float, spent: float) -> None:
        """A step with drafts."""
        self.drafted += 1
        self.gained = _KEEP * self.gained + gained
        self.spent = _KEEP * self.spent + spent
        if self.drafted < _TRIAL:
            return
        if self.gained > self.spent:
            self.next_rest = _FIRST_REST
            return
        self.rest, self.next_rest = self.next_rest, min(2 * self.next_rest, _LONGEST_REST)
        self.plain, self.drafted, self.gained, self.spent = self.plain + self.drafted, 0, 0.0, 0.0


class Worth:
    """A trial for each power of two of sequences in a batch.

    What the draft model takes to read a prompt serves a whole answer, so it is paid off over many steps.
    """

    def __init__(self) -> None:
        self._seconds = StepSeconds()
        self._trials: defaultdict[int, Trial] = defaultdict(Trial)
        self._owed = 0.0

    def wants_drafts(self, sequences: int) -> bool:
        """Whether a step of so many sequences should have drafts."""
        return self._trials[sequences.bit_length()].wants_drafts

    def owe(self, seconds: float) -> None:
        """The draft model has read prompts for so long."""
        self._owed += seconds

    def saw(self, step: Seen) -> None:
        self._seconds.add(step.rows, step.seconds)
        trial = self._trials[step.sequences.bit_length()]
        if not step.has_drafts:
            trial.go_without()
            return
        usual = self._seconds.of(step.rows - step.drafted)
        repaid = _REPAYMENT * self._owed
        self._owed -= repaid
        trial.add(
            gained=usual * step.accepted / step.sequences,
            spent=step.seconds - usual + step.draft_seconds + repaid,
        )
        if trial.rest and not trial.drafted:
            log.info("drafts do not pay with %d sequences: none for %d steps", step.sequences, trial.rest)
