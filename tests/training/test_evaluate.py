from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from training_fixtures import Workshop, picture_row, text_row, write_rows

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.embed import place
from okavango.modalities.encoders import decode, encode, load_encoder
from okavango.modalities.projector import pool
from okavango.modalities.prompt import Renderer
from okavango.training.build import build_trainee
from okavango.training.collate import LoadMedium, render_rows
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.evaluate import (
    Sample,
    answer_questions,
    held_out_loss,
    read_questions,
    sample_table,
)
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.loop import TrainingSet
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.spec import LoraSpec, TrainSpec


@pytest.fixture
def mixed(workshop: Workshop) -> Dataset:
    """Prompts of very different lengths, with and without pictures."""
    rows = [
        picture_row("images/0.png", "red fox"),
        text_row("Hello", "good day", "A much longer question, so that padding is needed?", "yes"),
        picture_row("images/1.png", "blue car", "And what may this one be, pray?"),
    ]
    return open_dataset(write_rows(workshop.folder / "mixed.jsonl", rows))


def trainee_of(base: Base) -> Trainee:
    torch.manual_seed(0)
    spec = TrainSpec(base="tiny", data=Path("none"), name="a", lora=LoraSpec(r=4))
    trainee = build_trainee(base, spec, torch.float32, modalities={"image"}, learned={"image"})
    with torch.no_grad():
        for name, parameter in trainee.lora_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return trainee


def loader_of(workshop: Workshop, dataset: Dataset) -> LoadMedium:
    base = workshop.base
    cache = FeatureCache(
        workshop.settings.features, "image", base.encoders["image"], base.heads["image"].spec, torch.float32
    )
    fill_cache(cache, [dataset], "cpu", Monitor())
    return lambda modality, key: cache.load(key)


def test_answers_equal_generate_for_each_prompt_alone(
    workshop: Workshop, mixed: Dataset, tiny_renderer: Renderer
) -> None:
    """transformers' generate, on the decoder with a plain PEFT adapter, a prompt at a time and unpadded."""
    trainee, spec = trainee_of(workshop.base), workshop.spec(max_new_tokens=12, batch_size=2)
    questions = read_questions(mixed, tiny_renderer, spec)
    load = loader_of(workshop, mixed)
    found = answer_questions(trainee, questions, tiny_renderer, load, spec, 512, Monitor())

    trainee.decoder.save_pretrained(workshop.folder / "peft", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(load_decoder(workshop.base, torch.float32), workshop.folder / "peft")
    head = load_head(workshop.base.heads["image"])
    encoder = load_encoder(workshop.base.encoders["image"])
    for question, sample in zip(questions, found, strict=True):
        embeddings = plain.get_input_embeddings()(torch.tensor([question.prompt.tokens]))
        features = encode(encoder, [decode(medium) for medium in question.prompt.media])
        place(embeddings, 0, question.prompt.spans, [head(pool(each, head.spec))[0] for each in features])
        tokens = plain.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False)[0]
        assert sample.answer == tiny_renderer.tokenizer.decode(tokens, skip_special_tokens=True)
    assert [sample.expected for sample in found] == ["red fox", "yes", "blue car"]
    assert len({sample.answer for sample in found}) == 3


def test_the_last_answer_is_asked_for(mixed: Dataset, workshop: Workshop, tiny_renderer: Renderer) -> None:
    question = read_questions(mixed, tiny_renderer, workshop.spec(system="Be kind."))[1]
    prompt = tiny_renderer.tokenizer.decode(question.prompt.tokens)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello")
    assert prompt.endswith("needed?<|im_end|>\n<|im_start|>assistant\n")


def test_what_is_not_learned_is_not_asked_for(
    workshop: Workshop, tmp_path: Path, tiny_renderer: Renderer
) -> None:
    row = text_row("one", "two", "three", "four")
    row["messages"][3]["weight"] = 0
    dataset = open_dataset(write_rows(tmp_path / "weighed.jsonl", [row]))
    (question,) = read_questions(dataset, tiny_renderer, workshop.spec())
    assert question.expected == "two"
    assert "three" not in tiny_renderer.tokenizer.decode(question.prompt.tokens)


def test_questions_are_shown_with_their_pictures_names(
    mixed: Dataset, workshop: Workshop, tiny_renderer: Renderer
) -> None:
    questions = read_questions(mixed, tiny_renderer, workshop.spec(eval_rows=2))
    assert [question.shown for question in questions] == [
        "0.png What is this?",
        "A much longer question, so that padding is needed?",
    ]


def test_the_loss_does_not_depend_on_batches(
    workshop: Workshop, mixed: Dataset, tiny_renderer: Renderer
) -> None:
    trainee = trainee_of(workshop.base)
    data = TrainingSet(render_rows(mixed, tiny_renderer, None, 512), loader_of(workshop, mixed))
    ways: list[dict[str, int]] = [
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_size": 3},
        {"batch_tokens": 80},
    ]
    losses = [held_out_loss(trainee, data, workshop.spec(**way)) for way in ways]
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * len(ways)
    assert losses[0] > 1


def test_the_table_shows_what_it_is_given_and_no_markup_of_it() -> None:
    output = io.StringIO()
    Console(width=120, file=output).print(
        sample_table([Sample("0.png [bold]what?", "a\nb", "x" * 99, 1, ())])
    )
    text = output.getvalue()
    assert "0.png [bold]what?" in text
    assert "a b" in text
    assert "x" * 59 + "…" in text


def test_prompts_near_the_context_get_short_answers(
    workshop: Workshop, tiny_renderer: Renderer, mixed: Dataset
) -> None:
    spec: TrainSpec = workshop.spec(max_new_tokens=50)
    questions = read_questions(mixed, tiny_renderer, spec)[:1]
    load = loader_of(workshop, mixed)
    context = len(questions[0].prompt.tokens) + 3
    trainee = trainee_of(workshop.base)
    (sample,) = answer_questions(trainee, questions, tiny_renderer, load, spec, context, Monitor())
    # a token is a byte here
    assert 1 <= len(sample.answer) <= 3
