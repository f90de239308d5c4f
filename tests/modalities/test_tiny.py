from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from okavango.modalities.base import Base, load_decoder, load_head, load_tokenizer, verify_base
from okavango.modalities.encoders import encode
from okavango.modalities.image import ImageEncoder
from okavango.modalities.projector import pool
from okavango.modalities.tiny import Architecture, write_tiny_base

PROMPTS = ("hello", "what is this?", "a", "Name the emoji", "zz top")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_tiny_base(tmp_path_factory.mktemp("tiny"))


def pictures(count: int) -> list[Image.Image]:
    values = np.random.default_rng(1).integers(0, 256, (count, 48, 40, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def greedy(base: Base, prompt: str) -> tuple[int, ...]:
    model, tokenizer = load_decoder(base, torch.float32), load_tokenizer(base)
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tuple(tokens[0, inputs["input_ids"].shape[1] :].tolist())


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_greedy_answers_are_varied_and_differ_by_prompt(tmp_path: Path, architecture: Architecture) -> None:
    base = write_tiny_base(tmp_path, architecture=architecture, image=False)
    answers = [greedy(base, prompt) for prompt in PROMPTS]
    assert len(set(answers)) == len(PROMPTS)
    assert all(len(set(answer)) > 4 for answer in answers)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny: Base, tmp_path: Path) -> None:
    again = write_tiny_base(tmp_path / "again")
    other = write_tiny_base(tmp_path / "other", seed=1)
    assert again.components == tiny.components
    assert not set(other.components.values()) & set(tiny.components.values())


def test_writing_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_tiny_base(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_every_component_has_the_digest_that_base_toml_gives(tiny: Base) -> None:
    verify_base(tiny)
    assert set(tiny.components) == {"decoder", "encoders.image", "projectors.image"}


def test_a_base_without_pictures_has_a_decoder_only(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path, image=False)
    assert set(base.components) == {"decoder"}


def test_the_tokenizer_gives_every_text_back(tiny: Base) -> None:
    tokenizer = load_tokenizer(tiny)
    text = "Grüße, 世界 🐘\n\t  two spaces <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


def test_the_chat_template_is_chatml(tiny: Base) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = load_tokenizer(tiny).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_features_have_the_shape_that_the_spec_gives(tiny: Base) -> None:
    spec = tiny.encoders["image"]
    for features in encode(ImageEncoder.load(spec), pictures(3)):
        assert features.shape == (spec.grid[0] * spec.grid[1], spec.width)
        assert features.dtype == torch.float32


def test_a_picture_has_the_same_features_alone_and_in_a_batch(tiny: Base) -> None:
    encoder = ImageEncoder.load(tiny.encoders["image"])
    images = pictures(5)
    together = torch.stack(encode(encoder, images))
    alone = torch.stack([encode(encoder, [image])[0] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(together, torch.stack(encode(encoder, images)))


def test_features_are_ordered_row_by_row(tiny: Base) -> None:
    picture = Image.new("RGB", (32, 32), "white")
    picture.paste("red", (8, 0, 16, 8))  # the second patch of the first row
    encoder = ImageEncoder.load(tiny.encoders["image"])
    plain, marked = encode(encoder, [Image.new("RGB", (32, 32), "white"), picture])
    assert (marked - plain).norm(dim=-1).argmax() == 1


def test_pictures_reach_the_decoder_as_loud_as_its_own_embeddings(tiny: Base) -> None:
    features = encode(ImageEncoder.load(tiny.encoders["image"]), pictures(4))
    head = tiny.heads["image"]
    embeddings = load_head(head)(torch.cat([pool(each, head.spec) for each in features]))
    own = load_decoder(tiny, torch.float32).get_input_embeddings().weight
    assert embeddings.shape == (4, 4, own.shape[1])
    assert embeddings.std() == pytest.approx(own.std().item(), rel=0.1)
    assert torch.pdist(embeddings.flatten(1)).min() > own.std()
