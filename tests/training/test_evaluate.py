from __future__ import annotations

import io
import math

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from training_fixtures import Workshop, picture_row, text_row, write_rows

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.embed import place
from okavango.modalities.image import ImageEncoder, decode_image
from okavango.modalities.projector import pool
from okavango.modalities.prompt import Renderer
from okavango.training.collate import render_rows
from okavango.training.dataset import Dataset, open_dataset
from okavango.training.evaluate import (
    Sample,
    answer_questions,
    held_out_loss,
    read_questions,
    sample_table,
    score,
)
from okavango.training.features import FeatureCache, fill_cache
from okavango.training.loop import TrainingSet
from okavango.training.model import Trainee, build_trainee
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
    trainee = build_trainee(base, LoraSpec(r=4), torch.float32, media=True, trains_head=True)
    with torch.no_grad():
        for name, parameter in trainee.lora_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return trainee


def cache_of(workshop: Workshop, dataset: Dataset) -> FeatureCache:
    base = workshop.base
    cache = FeatureCache(
        workshop.settings.features, base.encoders["image"], base.heads["image"].spec, torch.float32
    )
    fill_cache(cache, [dataset], "cpu", Monitor())
    return cache


def test_answers_equal_generate_for_each_prompt_alone(
    workshop: Workshop, mixed: Dataset, tiny_renderer: Renderer
) -> None:
    """transformers' generate, on the decoder with a plain PEFT adapter, a prompt at a time and unpadded."""
    trainee, spec = trainee_of(workshop.base), workshop.spec(max_new_tokens=12, batch_size=2)
    questions = read_questions(mixed, tiny_renderer, spec)
    load = cache_of(workshop, mixed).load
    found = answer_questions(trainee, questions, tiny_renderer, load, spec, 512, Monitor())

    trainee.decoder.save_pretrained(workshop.folder / "peft", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(load_decoder(workshop.base, torch.float32), workshop.folder / "peft")
    head = load_head(workshop.base.heads["image"])
    encoder = ImageEncoder.load(workshop.base.encoders["image"])
    for question, sample in zip(questions, found, strict=True):
        embeddings = plain.get_input_embeddings()(torch.tensor([question.prompt.tokens]))
        pictures = [decode_image(medium.data, mixed.limits) for medium in question.prompt.media]
        if pictures:
            place(embeddings, 0, question.prompt.spans, list(head(pool(encoder.encode(pictures), head.spec))))
        tokens = plain.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False)[0]
        assert sample.answer == tiny_renderer.tokenizer.decode(tokens, skip_special_tokens=True)
    assert [sample.expected for sample in found] == ["red fox", "yes", "blue car"]
    assert len({sample.answer for sample in found}) == 3


def test_the_last_answer_is_asked_for(mixed: Dataset, workshop: Workshop, tiny_renderer: Renderer) -> None:
    question = read_questions(mixed, tiny_renderer, workshop.spec(system="Be kind."))[1]
    prompt = tiny_renderer.tokenizer.decode(question.prompt.tokens)
    assert prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello")
    assert prompt.endswith("needed?<|im_end|>\n<|im_start|>assistant\n")


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
    data = TrainingSet(render_rows(mixed, tiny_renderer, None, 512), cache_of(workshop, mixed).load)
    losses = [held_out_loss(trainee, data, batch_size) for batch_size in (1, 2, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] > 1


def test_scores_equal_hand_computed_ones() -> None:
    # BLEU: words 7 of 8, pairs 5 of 6, threes 3 of 4, fours 1 of 2; lengths are equal
    answers, expected = ["a b c d", "p q r x"], ["a b c d", "p q r s"]
    found = score(answers, expected)
    assert found["bleu4"] == pytest.approx(100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25)
    assert found["exact_match"] == 0.5


def test_bleu_is_shortened_for_short_answers_and_punishes_brevity() -> None:
    assert score(["red fox", "cat"], ["red fox", "cat"])["bleu4"] == pytest.approx(100)
    # words 1 of 1 and nothing longer; one word where three are expected
    assert score(["red"], ["red old fox"])["bleu4"] == pytest.approx(100 * math.exp(1 - 3))


def test_chrf_equals_a_hand_computed_one() -> None:
    # "ab" against "abc": of the orders 1 and 2, precision is 1 and 1, recall 2/3 and 1/2; beta is 2
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert score(["ab"], ["abc"])["chrf"] == pytest.approx(expected, rel=1e-3)
    assert score(["same"], ["same"])["chrf"] == pytest.approx(100)


def test_exact_means_equal_but_for_space_around() -> None:
    assert score([" fox \n", "Fox", "fox"], ["fox", "fox", "fox"])["exact_match"] == pytest.approx(2 / 3)


def test_the_table_shows_what_it_is_given_and_no_markup_of_it() -> None:
    output = io.StringIO()
    Console(width=120, file=output).print(sample_table([Sample("0.png [bold]what?", "a\nb", "x" * 99)]))
    text = output.getvalue()
    assert "0.png [bold]what?" in text
    assert "a b" in text
    assert "x" * 59 + "…" in text


def test_prompts_near_the_context_get_short_answers(
    workshop: Workshop, tiny_renderer: Renderer, mixed: Dataset
) -> None:
    spec: TrainSpec = workshop.spec(max_new_tokens=50)
    questions = read_questions(mixed, tiny_renderer, spec)[:1]
    load = cache_of(workshop, mixed).load
    context = len(questions[0].prompt.tokens) + 3
    trainee = trainee_of(workshop.base)
    (sample,) = answer_questions(trainee, questions, tiny_renderer, load, spec, context, Monitor())
    # a token is a byte here
    assert 1 <= len(sample.answer) <= 3
