"""How good an adapter is on rows that it has not seen: loss, and greedy answers against the expected ones."""

# Shapes: B prompts, N tokens of the longest, D decoder width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from okavango.modalities.prompt import Rendered, Renderer
from okavango.modalities.rope import places_of
from okavango.training.collate import LoadMedium, load_media
from okavango.training.dataset import Dataset, Example
from okavango.training.loop import TrainingSet, data_order
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.packing import looking_ahead
from okavango.training.spec import TrainSpec

_MOST_SHOWN = 60  # characters of a cell


@dataclass(frozen=True)
class Question:
    """A held-out row's last answer, and what leads to it. `shown`: media's names and text, for people."""

    prompt: Rendered
    expected: str
    shown: str
    line: int


@dataclass(frozen=True)
class Sample:
    """An answer. `line`: of its row in the held-out data; `media`: digests of what it is about."""

    shown: str
    expected: str
    answer: str
    line: int
    media: tuple[str, ...]


@torch.no_grad()
def held_out_loss(trainee: Trainee, data: TrainingSet, spec: TrainSpec) -> float:
    """Mean cross-entropy of the rows' answer tokens, in nats."""
    trainee.eval()
    order, rows = data_order(data.rows, spec), data.rows
    total = torch.zeros((), dtype=torch.float64)
    for chosen in (batch for step in range(order.steps_an_epoch) for batch in order.batches(step)):
        batch = trainee.batch([rows[i] for i in chosen], data.load)
        total += trainee.loss(batch).double().cpu()
    return float(total) / sum(row.answer_tokens for row in rows)


def read_questions(dataset: Dataset, renderer: Renderer, spec: TrainSpec) -> list[Question]:
    """The first `eval_rows` rows of a dataset, as prompts."""
    count = min(len(dataset), spec.eval_rows)
    return [_question(dataset, i, renderer, spec.system) for i in range(count)]


def answer_questions(
    trainee: Trainee,
    questions: Sequence[Question],
    renderer: Renderer,
    load: LoadMedium,
    spec: TrainSpec,
    context: int,
    monitor: Monitor,
) -> list[Sample]:
    """Greedy answers, in the questions' order."""
    trainee.eval()
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt.tokens))
    samples: dict[int, Sample] = {}
    with monitor.bar("answering", len(questions)) as advance:
        for start in range(0, len(order), spec.batch_size):
            chosen = order[start : start + spec.batch_size]
            prompts = [questions[i].prompt for i in chosen]
            texts = _generate(trainee, prompts, renderer, load, spec.max_new_tokens, context)
            for i, text in zip(chosen, texts, strict=True):
                samples[i] = _sample(questions[i], text)
            advance(len(chosen))
            monitor.check()
    return [samples[i] for i in range(len(questions))]


def _sample(question: Question, answer: str) -> Sample:
    media = tuple(medium.digest for medium in question.prompt.media)
    return Sample(question.shown, question.expected, answer, question.line, media)


def sample_table(samples: Iterable[Sample]) -> Table:
    table = Table("question", "expected", "answer", title="Held-out answers", title_justify="left")
    for sample in samples:
        table.add_row(*(_cell(text) for text in (sample.shown, sample.expected, sample.answer)))
    return table


@torch.no_grad()
def _generate(
    trainee: Trainee,
    prompts: Sequence[Rendered],
    renderer: Renderer,
    load: LoadMedium,
    max_new_tokens: int,
    context: int,
) -> list[str]:
    from transformers import GenerationConfig

    embeddings, mask = _left_padded(trainee, prompts, load)
    tokenizer = renderer.tokenizer
    ends = end_tokens(trainee, renderer)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(1, min(max_new_tokens, context - embeddings.shape[1])),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
    )
    with looking_ahead(_mutual(prompts)), trainee.at(*_in_grids(prompts, trainee.device)):
        found = trainee.decoder.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=config
        )
    return [str(tokenizer.decode(_until(row, ends), skip_special_tokens=True)) for row in found.tolist()]


def _in_grids(prompts: Sequence[Rendered], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Places [3, B, N] of prompts that end together, and how far beyond its number of tokens each goes on;
    nothing where no decoder asks."""
    if not any(span.grid for prompt in prompts for span in prompt.spans):
        return None, None
    longest = max(len(prompt.tokens) for prompt in prompts)
    places, shift = torch.zeros(3, len(prompts), longest, dtype=torch.long), []
    for i, prompt in enumerate(prompts):
        own, after = places_of(len(prompt.tokens), prompt.spans)
        places[:, i, longest - len(prompt.tokens) :] = torch.from_numpy(own)
        shift.append(after - len(prompt.tokens))
    return places.to(device), torch.tensor(shift, device=device)


def _mutual(prompts: Sequence[Rendered]) -> list[tuple[int, int, int]]:
    """(row, start, end) of positions that see each other, in prompts that end together."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    return [
        (i, longest - len(prompt.tokens) + span.start, longest - len(prompt.tokens) + span.end)
        for i, prompt in enumerate(prompts)
        for span in prompt.spans
        if span.looks_ahead
    ]


def _left_padded(trainee: Trainee, prompts: Sequence[Rendered], load: LoadMedium) -> tuple[Tensor, Tensor]:
    """Input embeddings [B, N, D] and attention mask [B, N]: answers begin where all prompts end."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[i, longest - len(prompt.tokens) :] = 1
    embeddings = trainee.embedding()(tokens.to(trainee.device))
    for i, prompt in enumerate(prompts):
        _place(trainee, embeddings[i, longest - len(prompt.tokens) :][None], prompt, load)
    return embeddings, mask.to(trainee.device)


def _place(trainee: Trainee, embeddings: Tensor, prompt: Rendered, load: LoadMedium) -> None:
    digests = [medium.digest for medium in prompt.media]
    trainee.place(embeddings, prompt.spans, trainee.make(load_media([(prompt.spans, digests)], load)))


def end_tokens(trainee: Trainee, renderer: Renderer) -> list[int]:
    """Ids that end an answer, as serving knows them: the decoder's and the tokenizer's."""
    config = trainee.base_decoder.generation_config
    named = config.eos_token_id if config is not None else None
    ids = {*(named if isinstance(named, list) else [named]), renderer.tokenizer.eos_token_id} - {None}
    return sorted(i for i in ids if i is not None)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def _question(dataset: Dataset, i: int, renderer: Renderer, system: str | None) -> Question:
    example = dataset.row(i)
    *_, last = (i for i, each in enumerate(example.messages) if each.role == "assistant" and each.is_learned)
    prompt = renderer.prompt(example.messages[:last], system)
    return Question(prompt, example.messages[last].text, _shown(dataset, i, example), example.line)


def _shown(dataset: Dataset, i: int, example: Example) -> str:
    """The row's last question, led by the names of its media where they have any."""
    text = next((m.text for m in reversed(example.messages) if m.role == "user"), "")
    return " ".join([*dataset.names(i), text])


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= _MOST_SHOWN else line[: _MOST_SHOWN - 1] + "…"
