"""Which layers of an encoder can be adapted, and that adapting them is PEFT's own sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from okavango.modalities.adapted import adapted, encoder_targets
from okavango.modalities.base import Base
from okavango.modalities.encoders import encode, load_encoder
from okavango.modalities.lora import LoraWeights
from okavango.modalities.tower import measure_tower, write_tower

PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
PLAIN = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}


def timm(name: str, side: int, pool: str) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": "none", "image_size": side}


TOWERS = {
    "CLIP": (PLAIN, {"c_fc", "c_proj"}),
    "CoCa, which pools by attention": (
        PLAIN | {"attentional_pool": True, "attn_pooler_heads": 2},
        {"c_fc", "c_proj"},
    ),
    "SigLIP, which pools by attention": (timm("test_vit", 64, "map"), {"qkv", "proj", "fc1", "fc2"}),
    "ConvNeXt": (timm("test_convnext", 128, "avg"), {"fc1", "fc2"}),
    "CLIP's ResNet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 16}, set()),
}


@pytest.mark.parametrize("name", TOWERS)
def test_layers_that_features_come_through_are_targets(tmp_path: Path, name: str) -> None:
    vision, expected = TOWERS[name]
    write_tower(tmp_path / "t", {"embed_dim": 32, "vision_cfg": vision}, PREPROCESS)
    spec = measure_tower(tmp_path / "t")
    targets = encoder_targets(spec)
    assert {target.name.rpartition(".")[2] for target in targets} == expected
    module = load_encoder(spec).module
    for target in targets:
        layer = module.get_submodule(target.name)
        assert (layer.in_features, layer.out_features) == (target.in_features, target.out_features)


def test_an_adapted_encoder_is_what_peft_makes_of_it_and_itself_again_after(tiny_base: Base) -> None:
    spec = tiny_base.encoders["image"]
    names = [target.name for target in encoder_targets(spec)]
    picture = [Image.linear_gradient("L").convert("RGB")]
    ours, theirs = load_encoder(spec), load_encoder(spec)
    plain = encode(ours, picture)[0]
    model = get_peft_model(theirs.module, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    generator = torch.Generator().manual_seed(1)
    factors = {}
    with torch.no_grad():
        for name in names:
            layer = model.base_model.model.get_submodule(name)
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            factors[name] = (a.detach(), b.detach().T * 2)
    with adapted(ours.module, LoraWeights(factors, 4)):
        found = encode(ours, picture)[0]
    torch.testing.assert_close(found, encode(theirs, picture)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, atol=0.1)
    assert torch.equal(encode(ours, picture)[0], plain)
