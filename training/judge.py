"""What a run is worth on rows that it does not learn from: before it, on the way, and at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from okavango.training.collate import LoadMedium, load_media
from okavango.training.evaluate import Question, Sample, answer_questions, held_out_loss, read_questions
from okavango.training.joint import retrieval
from okavango.training.loop import TrainingSet
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.scores import Estimate, ScoreName, score
from okavango.training.task import Task, modalities_of

_BEFORE = "before.json"


class Judge:
    """Of a job with held-out rows.

    Args:
        folder: the job's, where the base's answers are kept for a later attempt.
    """

    def __init__(
        self, task: Task, trainee: Trainee, load: LoadMedium, folder: Path, monitor: Monitor
    ) -> None:
        assert task.held_out is not None
        self._task = task
        self._trainee = trainee
        self._load = load
        self._folder = folder
        self._monitor = monitor
        self._rows = TrainingSet(task.held_out_rows, load)
        self._questions = read_questions(task.held_out, task.renderer, task.spec)
        if len(self._questions) < len(task.held_out):
            count, all_rows = len(self._questions), len(task.held_out)
            monitor.say(f"Of {all_rows:,} held-out rows, the first {count:,} are answered.")

    def ask_the_base(self) -> None:
        """Keep what the trainee answers before it has learned anything: what its base would say."""
        if not self._task.spec.compare or (self._folder / _BEFORE).is_file():
            return
        answers = [sample.answer for sample in self._answers(self._questions)]
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{_BEFORE}"
        partial.write_text(json.dumps(answers))
        partial.rename(self._folder / _BEFORE)

    def look(self, step: int) -> float:
        """The held-out loss, which is told, with a few answers."""
        loss = held_out_loss(self._trainee, self._rows, self._task.spec)
        self._monitor.say(f"step {step}: held-out loss {loss:.3f}")
        self._monitor.note("metrics", f"step {step}", step=step, valid_loss=loss)
        self._show(self._answers(self._questions[: self._task.spec.samples]), step)
        return loss

    def conclude(self) -> tuple[dict[str, float], list[Sample]]:
        """Scores with their intervals, the base's beside them, and the answers behind them."""
        loss = held_out_loss(self._trainee, self._rows, self._task.spec)
        samples = self._answers(self._questions)
        expected = [sample.expected for sample in samples]
        names = self._task.spec.scores or self._usual()
        found = score([sample.answer for sample in samples], expected, names)
        metrics = {"loss": loss, **_flat(found), **self._base_scores(expected, names), **self._retrieval()}
        self._monitor.note("scores", "scores on what was held out", **metrics)
        self._show(samples[: self._task.spec.samples], self._task.steps)
        return metrics, samples

    def _usual(self) -> tuple[ScoreName, ...]:
        speech = "audio" in modalities_of(self._task.held_out_rows)
        return ("bleu4", "chrf", "exact_match", "wer") if speech else ("bleu4", "chrf", "exact_match")

    def _base_scores(self, expected: Sequence[str], names: Sequence[ScoreName]) -> dict[str, float]:
        """Nothing where it was not asked: by the specification, or an attempt on another host was."""
        path = self._folder / _BEFORE
        if not path.is_file():
            return {}
        before = score(json.loads(path.read_text()), expected, names)
        return {f"base_{name}": estimate.value for name, estimate in before.items()}

    def _answers(self, questions: Sequence[Question]) -> list[Sample]:
        task = self._task
        context = task.base.decoder.context
        return answer_questions(
            self._trainee, questions, task.renderer, self._load, task.spec, context, self._monitor
        )

    def _show(self, samples: Sequence[Sample], step: int) -> None:
        for sample in samples:
            self._monitor.note(
                "sample",
                sample.shown,
                step=step,
                line=sample.line,
                media=list(sample.media),
                expected=sample.expected,
                answer=sample.answer,
            )

    def _retrieval(self) -> dict[str, float]:
        """How well held-out media and answers find each other; nothing without a joint objective."""
        trainee, rows, size = self._trainee, self._task.held_out_rows, self._task.spec.batch_size
        if trainee.space is None:
            return {}
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        made = (
            (trainee.make(load_media([(row.spans, row.media) for row in chunk], self._load)), chunk)
            for chunk in chunks
        )
        return retrieval(trainee.space, made, trainee.embedding())


def _flat(found: Mapping[str, Estimate]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, estimate in found.items():
        flat |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return flat
