"""How good an adapter is on rows that it has not seen: loss, and greedy answers against the expected ones."""

# Shapes: B prompts, N tokens of the longest, D decoder width

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from okavango.modalities.embed import place
from okavango.modalities.prompt import Rendered, Renderer
from okavango.training.collate import LoadFeatures, collate
from okavango.training.dataset import Dataset, Example
from okavango.training.loop import TrainingSet
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.objective import answer_loss
from okavango.training.spec import TrainSpec

_MOST_SHOWN = 60  # characters of a cell


@dataclass(frozen=True)
class Question:
    """A held-out row's last answer, and what leads to it. `shown`: picture's name and text, for people."""

    prompt: Rendered
    expected: str
    shown: str


@dataclass(frozen=True)
class Sample:
    shown: str
    expected: str
    answer: str


@torch.no_grad()
def held_out_loss(trainee: Trainee, data: TrainingSet, batch_size: int) -> float:
    """Mean cross-entropy of the rows' answer tokens, in nats."""
    trainee.eval()
    rows = sorted(data.rows, key=lambda row: row.length)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], data.load).to(trainee.device)
        total += answer_loss(trainee(batch), batch.labels).double().cpu()
    return float(total) / sum(row.answer_tokens for row in rows)


def read_questions(dataset: Dataset, renderer: Renderer, spec: TrainSpec) -> list[Question]:
    """The first `eval_rows` rows of a dataset, as prompts."""
    count = min(len(dataset), spec.eval_rows)
    return [_question(dataset, i, renderer, spec.system) for i in range(count)]


def answer_questions(
    trainee: Trainee,
    questions: Sequence[Question],
    renderer: Renderer,
    load: LoadFeatures,
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
                samples[i] = Sample(questions[i].shown, questions[i].expected, text)
            advance(len(chosen))
            monitor.check()
    return [samples[i] for i in range(len(questions))]


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """BLEU-4 and chrF over all answers, as sacrebleu counts them (0 to 100), and the share that is exact."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    exact = sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True))
    return {
        # effective order: answers that all have fewer than four words are not worth nothing
        "bleu4": BLEU(effective_order=True).corpus_score(list(answers), [list(expected)]).score,
        "chrf": CHRF().corpus_score(list(answers), [list(expected)]).score,
        "exact_match": exact / len(answers),
    }


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
    load: LoadFeatures,
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
    found = trainee.decoder.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config)
    return [str(tokenizer.decode(_until(row, ends), skip_special_tokens=True)) for row in found.tolist()]


def _left_padded(trainee: Trainee, prompts: Sequence[Rendered], load: LoadFeatures) -> tuple[Tensor, Tensor]:
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


def _place(trainee: Trainee, embeddings: Tensor, prompt: Rendered, load: LoadFeatures) -> None:
    if not prompt.media:
        return
    assert trainee.head is not None
    pooled = torch.stack([load(medium.digest) for medium in prompt.media])
    place(embeddings, 0, prompt.spans, list(trainee.head(pooled.to(trainee.device))))


def end_tokens(trainee: Trainee, renderer: Renderer) -> list[int]:
    """Ids that end an answer, as serving knows them: the decoder's and the tokenizer's."""
    config = getattr(trainee.decoder.get_base_model(), "generation_config", None)
    named = config.eos_token_id if config is not None else None
    ids = {*(named if isinstance(named, list) else [named]), renderer.tokenizer.eos_token_id} - {None}
    return sorted(i for i in ids if i is not None)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def _question(dataset: Dataset, i: int, renderer: Renderer, system: str | None) -> Question:
    example = dataset.row(i)
    last = max(k for k, message in enumerate(example.messages) if message.role == "assistant")
    prompt = renderer.prompt(example.messages[:last], system)
    return Question(prompt, example.messages[last].text, _shown(dataset, i, example))


def _shown(dataset: Dataset, i: int, example: Example) -> str:
    """The row's last question, led by the names of its pictures where they have any."""
    text = next((m.text for m in reversed(example.messages) if m.role == "user"), "")
    names = [url.rpartition("/")[2] for url in _urls(json.loads(dataset.line(i))) if url[:5] != "data:"]
    return " ".join([*names, text])


def _urls(raw: Mapping[str, Any]) -> list[str]:
    contents = [message["content"] for message in raw["messages"]]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= _MOST_SHOWN else line[: _MOST_SHOWN - 1] + "…"
