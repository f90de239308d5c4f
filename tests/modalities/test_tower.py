import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from okavango.modalities.base import Base, EncoderSpec
from okavango.modalities.encoders import encode
from okavango.modalities.image import ImageEncoder, decode_image, load_tower
from okavango.modalities.tiny import write_tiny_base
from okavango.modalities.tiny_bundle import picture_bytes
from okavango.modalities.tower import CONFIG_FILE, import_tower, measure_tower, write_tower
from okavango.platform.errors import BindError, ConfigError, UnsupportedError

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def timm_config(name: str, image_size: int) -> dict[str, object]:
    vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "none", "image_size": image_size}
    return {"embed_dim": 64, "vision_cfg": vision}


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (60, 40), "white")
    image.paste(colour, (5, 5, 30, 30))
    return image


# timm's own tiny test models: a transformer made for 160 pixels, and a convolutional network.
@pytest.mark.parametrize(
    ("name", "image_size", "grid"),
    [("test_vit", 160, (10, 10)), ("test_vit", 64, (4, 4)), ("test_efficientnet", 128, (4, 4))],
)
def test_timm_towers_are_measured_and_encode_like_any_other(
    tmp_path: Path, name: str, image_size: int, grid: tuple[int, int]
) -> None:
    write_tower(tmp_path / "t", timm_config(name, image_size), PREPROCESS)
    spec = measure_tower(tmp_path / "t")
    assert (spec.image_size, spec.grid) == (image_size, grid)
    features = encode(ImageEncoder.load(spec), [picture("red"), picture("blue")])
    assert [each.shape for each in features] == [(grid[0] * grid[1], spec.width)] * 2
    assert not torch.allclose(features[0], features[1])


def test_a_tower_keeps_the_weights_that_it_was_given(tmp_path: Path, tiny_base: Base) -> None:
    spec = tiny_base.encoders["image"]
    import_tower(tmp_path / "t", f"local-dir:{spec.path}")
    images = [picture("red"), picture("green")]
    copied = encode(ImageEncoder.load(measure_tower(tmp_path / "t")), images)
    assert all(map(torch.equal, copied, encode(ImageEncoder.load(spec), images)))


def test_a_tower_with_positions_for_another_size_is_resampled_alike_by_everyone(tmp_path: Path) -> None:
    write_tower(tmp_path / "t", timm_config("test_vit", 64), PREPROCESS)
    import_tower(tmp_path / "again", str(tmp_path / "t"))
    images = [picture("red")]
    first, second = (
        encode(ImageEncoder.load(measure_tower(tmp_path / name)), images)[0] for name in ("t", "again")
    )
    assert torch.equal(first, second)


def test_a_missing_or_extra_tensor_is_refused(tmp_path: Path, tiny_base: Base) -> None:
    spec = tiny_base.encoders["image"]
    config = json.loads((spec.path / CONFIG_FILE).read_text())["model_cfg"]
    tensors = load_tower(spec.path, spec.image_size)[0].state_dict()
    with pytest.raises(BindError, match="extra"):
        write_tower(tmp_path / "a", config, PREPROCESS, tensors | {"extra": torch.ones(1)})
    tensors.pop("conv1.weight")
    with pytest.raises(BindError, match=r"conv1\.weight"):
        write_tower(tmp_path / "b", config, PREPROCESS, tensors)
    assert not any(tmp_path.iterdir())


def test_an_encoder_that_is_not_as_described_is_refused(tiny_base: Base) -> None:
    spec = tiny_base.encoders["image"]
    lying = EncoderSpec(spec.path, spec.digest, spec.image_size, spec.width, (2, 8))
    with pytest.raises(ConfigError, match=r"4 × 4 × 32"):
        encode(ImageEncoder.load(lying), [picture("red")])


def test_a_folder_without_a_tower_is_refused(tmp_path: Path) -> None:
    spec = EncoderSpec(tmp_path, "", 32, 32, (4, 4))
    with pytest.raises(ConfigError, match="not a usable open_clip model"):
        ImageEncoder.load(spec)
    with pytest.raises(ConfigError, match="not an open_clip model"):
        measure_tower(tmp_path)


def test_torn_weights_are_refused(tmp_path: Path) -> None:
    write_tower(tmp_path / "t", timm_config("test_vit", 64), PREPROCESS)
    spec = measure_tower(tmp_path / "t")
    weights = tmp_path / "t" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="not a usable open_clip model"):
        ImageEncoder.load(spec)


def test_oblong_towers_are_refused(tmp_path: Path) -> None:
    write_tower(tmp_path / "t", timm_config("test_vit", 64), PREPROCESS)
    path = tmp_path / "t" / CONFIG_FILE
    path.write_text(path.read_text().replace('"image_size": 64', '"image_size": [64, 96]'))
    with pytest.raises(UnsupportedError, match=r"\[64, 96\]"):
        measure_tower(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "weights", "text"),
    [
        ("ViT-B32", None, "did you mean ViT-B-32"),
        ("qqqqqq", None, "list_models"),
        ("ViT-B-32", None, "none named; known: openai"),
        ("ViT-B-32", "laion9b", "'laion9b' is neither a tag nor a file"),
        ("local-dir:/nowhere", None, "open_clip cannot load it"),
        ("local-dir:/nowhere", "openai", "brings its own weights"),
    ],
)
def test_unknown_names_and_weights_are_refused_with_those_that_there_are(
    tmp_path: Path, name: str, weights: str | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        import_tower(tmp_path / "t", name, weights)


def test_loading_a_tower_leaves_the_global_random_state_alone(tiny_base: Base) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    ImageEncoder.load(tiny_base.encoders["image"])
    assert torch.equal(torch.rand(2), expected)


def test_features_of_several_blocks_are_joined_and_change_the_digest(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "tiny")
    one = base.encoders["image"]
    both = measure_tower(one.path, (-2, -1))
    assert (both.width, both.grid) == (2 * one.width, one.grid)
    assert both.digest != one.digest
    picture = [decode_image(picture_bytes(3))]
    joined = encode(ImageEncoder.load(both), picture)[0]
    last = encode(ImageEncoder.load(one), picture)[0]
    assert torch.equal(joined[..., one.width :], last)
    assert not torch.allclose(joined[..., : one.width], last)


def test_a_block_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="cannot be joined"):
        measure_tower(base.encoders["image"].path, (-9,))
