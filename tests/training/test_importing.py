"""Adapters from elsewhere: whole and bound, or refused before anything is stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_fixtures import Workshop
from typer.testing import CliRunner, Result

from okavango.modalities.base import load_decoder
from okavango.modalities.tiny import CHAT_TEMPLATE, write_tiny_base
from okavango.platform.cli import app
from okavango.platform.errors import BindError, ConflictError, InputError, NotFoundError, UnsupportedError
from okavango.serving.adapters.gate import ParityGate
from okavango.training.importing import choose_base, import_peft


def save_peft(workshop: Workshop, name: str = "trained", **options: Any) -> Path:
    """What a user of PEFT has, with what trainers leave beside it."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    torch.manual_seed(1)
    decoder = load_decoder(workshop.base, torch.float32)
    model = get_peft_model(decoder, LoraConfig(**{**values, "task_type": "CAUSAL_LM", **options}))
    model.peft_config["default"].base_model_name_or_path = "someone/base-1B"
    folder = workshop.folder / name
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "training_args.bin").write_bytes(b"not ours")
    return folder


def take(workshop: Workshop, folder: Path, name: str = "brought") -> Any:
    return import_peft(folder, name, workshop.base, workshop.catalog, workshop.store)


@pytest.fixture
def okavango(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OKAVANGO_HOME", str(workshop.settings.home))
    monkeypatch.setenv("OKAVANGO_CACHE", str(workshop.settings.cache))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["adapters", *arguments])

    return call


def test_it_becomes_a_version_that_serving_marks_bound(workshop: Workshop) -> None:
    folder = save_peft(workshop)
    imported = take(workshop, folder)
    version = workshop.catalog.resolve("brought")
    assert version == imported.version
    assert (version.ref, version.state) == ("brought@1", "registered")
    assert version.components == {"decoder": workshop.base.components["decoder"]}
    assert version.lineage["imported"]["made_for"] == "someone/base-1B"
    assert (imported.layers, imported.rank) == (14, 4)
    stored = workshop.store.fetch(version.digest)
    names = {path.relative_to(stored).as_posix() for path in stored.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "decoder/adapter_config.json", "decoder/adapter_model.safetensors"}
    verdict = ParityGate(workshop.base).check(stored)
    assert (verdict.state, verdict.verification) == ("bound", {"probes": 0})


def test_the_same_files_again_are_the_same_version_and_others_the_next(workshop: Workshop) -> None:
    folder = save_peft(workshop)
    first = take(workshop, folder).version
    assert take(workshop, folder).version == first
    assert take(workshop, save_peft(workshop, "other", r=2)).version.ref == "brought@2"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "bias='lora_only'"),
        ({"modules_to_save": ["embed_tokens"]}, "embeddings and output layer"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embeddings"),
        ({"target_parameters": ["up_proj.weight"], "target_modules": ["q_proj"]}, "bare parameters"),
        ({"trainable_token_indices": [3]}, "single tokens"),
    ],
)
def test_what_cannot_be_served_is_refused_and_nothing_is_stored(
    workshop: Workshop, options: dict[str, Any], word: str
) -> None:
    with pytest.raises(UnsupportedError, match=word):
        take(workshop, save_peft(workshop, **options))
    assert workshop.catalog.list_adapters() == ()
    assert not list(workshop.settings.home.glob("artifacts/*"))


def test_another_bases_adapter_is_refused_with_every_layer_that_does_not_fit(workshop: Workshop) -> None:
    folder = save_peft(workshop)
    base = write_tiny_base(workshop.folder / "gpt2", architecture="gpt2", name="gpt", image=False)
    with pytest.raises(BindError, match="14 of its 14 layers") as caught:
        import_peft(folder, "brought", base, workshop.catalog, workshop.store)
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            assert f"model.layers.{layer}.{name}" in str(caught.value)


def test_names_that_are_taken_or_wrong_are_refused(workshop: Workshop) -> None:
    folder = save_peft(workshop)
    with pytest.raises(InputError, match="is not a name"):
        take(workshop, folder, "No Name")
    with pytest.raises(InputError, match="name of a base"):
        take(workshop, folder, "tiny")
    with pytest.raises(NotFoundError, match="no such directory"):
        take(workshop, folder / "gone")
    other = write_tiny_base(workshop.folder / "other", name="other", image=False)
    take(workshop, folder)
    with pytest.raises(ConflictError, match="belongs to base 'tiny'"):
        import_peft(folder, "brought", other, workshop.catalog, workshop.store)


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        ("chat_template.jinja", CHAT_TEMPLATE, True),
        ("chat_template.jinja", "{{ messages }}", False),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"}), False),
        ("tokenizer_config.json", "{}", True),
    ],
)
def test_another_chat_template_beside_it_is_told(
    workshop: Workshop, file: str, text: str, same: bool
) -> None:
    folder = save_peft(workshop)
    (folder / file).write_text(text)
    assert take(workshop, folder).same_template is same


def test_the_command_says_what_came_of_it(okavango: Any, workshop: Workshop) -> None:
    folder = save_peft(workshop, r=16)
    done = okavango("import", str(folder), "--name", "brought")
    assert done.exit_code == 0, done.output
    version = workshop.catalog.resolve("brought@1")
    assert done.output.splitlines() == [
        f"brought@1  {version.digest}",
        "14 layers of tiny adapted, rank 16",
        "It names someone/base-1B as its base.",
        "Every tensor fits tiny; without probes a server marks it bound, not ready.",
        "Serve it with: okavango serve --base tiny",
    ]
    assert "brought" in okavango("list").output
    assert "someone/base-1B" in okavango("show", "brought@1").output


def test_with_several_bases_the_command_asks_which(okavango: Any, workshop: Workshop) -> None:
    folder = save_peft(workshop)
    shutil.copytree(workshop.base.folder, workshop.settings.bases / "second")
    asked = okavango("import", str(folder), "--name", "brought")
    assert asked.exit_code == 1
    assert "which base was it trained on? (known: second, tiny)" in asked.output
    assert okavango("import", str(folder), "--name", "brought", "--base", "tiny").exit_code == 0


def test_without_any_base_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base build starter"):
        choose_base(tmp_path)
