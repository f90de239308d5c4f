from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from training_fixtures import Workshop, text_row, write_rows

from okavango.modalities.base import load_decoder, load_head
from okavango.modalities.embed import place
from okavango.modalities.encoders import decode, encode, load_encoder
from okavango.modalities.lora import find_targets
from okavango.modalities.peft_files import read_peft
from okavango.modalities.probes import read_probes
from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head, pool
from okavango.modalities.prompt import Renderer
from okavango.platform.bundle import read_system, verify
from okavango.platform.errors import ConflictError
from okavango.training.build import build_trainee
from okavango.training.dataset import open_dataset
from okavango.training.model import Trainee
from okavango.training.publish import Origin, finished_bundle, publish, write_bundle
from okavango.training.spec import LoraSpec

SCORES = {"train_loss": 0.5, "chrf": 12.0}


def trainee_of(workshop: Workshop, *, media: bool = True, trains_head: bool = True, **lora: Any) -> Trainee:
    """As after training: factors and head are nothing that a fresh one could have."""
    torch.manual_seed(3)
    spec = workshop.spec(lora=LoraSpec(**{"r": 4, "alpha": 8, **lora}), head={"train": trains_head})
    modalities = {"image"} if media else set()
    trainee = build_trainee(workshop.base, spec, torch.bfloat16, modalities=modalities, learned=modalities)
    with torch.no_grad():
        for parameter in trainee.trained().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return trainee


def origin_of(workshop: Workshop, data: Path | None = None, **values: Any) -> Origin:
    spec = workshop.spec(**values)
    dataset = open_dataset(data or workshop.folder / "pictures.jsonl")
    return Origin(workshop.base, spec, dataset, None, "job-1", steps=7, tokens=70)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_head(folder: Path) -> ProjectionHead:
    from safetensors.torch import load_file

    spec = HeadSpec(**json.loads((folder / "projectors" / "image.json").read_text()))
    return bind_head(spec, load_file(folder / "projectors" / "image.safetensors"), where="test")


def test_the_bundle_holds_what_the_contract_names(workshop: Workshop, tiny_renderer: Renderer) -> None:
    folder = workshop.folder / "bundle"
    origin = origin_of(workshop, system="Be brief.")
    written = write_bundle(folder, trainee_of(workshop), origin, tiny_renderer, SCORES)
    assert verify(folder) == written
    assert files(folder) == {
        "manifest.json",
        "decoder/adapter_config.json",
        "decoder/adapter_model.safetensors",
        "projectors/image.safetensors",
        "projectors/image.json",
        "prompt.json",
        "probes.safetensors",
    }
    components = workshop.base.components
    assert written.components == {name: components[name] for name in ("decoder", "encoders.image")}
    assert written.modalities == ("image",)
    assert written.metrics == SCORES
    assert read_system(folder) == "Be brief."


def test_the_lineage_says_what_made_it_and_nothing_of_this_machine(
    workshop: Workshop, tiny_renderer: Renderer
) -> None:
    folder = workshop.folder / "bundle"
    origin = origin_of(workshop, lora={"r": 4, "targets": ["q_proj"]}, seed=11)
    lineage = write_bundle(folder, trainee_of(workshop), origin, tiny_renderer, {}).lineage
    assert lineage["base"] == {"name": "tiny", "digest": workshop.base.digest}
    assert lineage["data"] == {"name": "pictures.jsonl", "digest": origin.data.digest, "rows": 8}
    assert (lineage["job"], lineage["seed"], lineage["steps"]) == ("job-1", 11, 7)
    assert lineage["spec"]["lora"]["targets"] == ["q_proj"]
    assert lineage["versions"].keys() == {"okavango", "torch", "transformers", "peft"}
    for name in ("manifest.json", "decoder/adapter_config.json"):
        assert str(workshop.folder) not in (folder / name).read_text()
        assert str(workshop.base.folder) not in (folder / name).read_text()
    config = json.loads((folder / "decoder" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_plain_peft_on_the_bundle_gives_the_probes(workshop: Workshop, tiny_renderer: Renderer) -> None:
    """An independent forward pass: transformers' attention, PEFT's layers, the head as it was saved."""
    folder = workshop.folder / "bundle"
    write_bundle(folder, trainee_of(workshop), origin_of(workshop), tiny_renderer, {})
    base = workshop.base
    model = PeftModel.from_pretrained(load_decoder(base, torch.float32), folder / "decoder")
    head, encoder = read_head(folder), load_encoder(base.encoders["image"])
    probes = read_probes(folder)
    assert [sum(len(m.media) for m in probe.messages) for probe in probes] == [1, 1, 1, 0]
    for probe in probes:
        rendered = tiny_renderer.conversation(probe.messages, probe.system)
        assert probe.tokens.tolist() == list(rendered.tokens)
        assert all(rendered.loss[position + 1] for position in probe.positions.tolist())
        assert len(probe.positions) == 4
        embeddings = model.get_input_embeddings()(probe.tokens[None])
        with torch.no_grad():
            for span, medium in zip(rendered.spans, rendered.media, strict=True):
                features = encode(encoder, [decode(medium)])[0]
                place(embeddings, 0, [span], [head(pool(features, head.spec))[0]])
            logits = model(inputs_embeds=embeddings).logits[0, probe.positions]
        torch.testing.assert_close(probe.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_every_tensor_binds_in_serving(workshop: Workshop, tiny_renderer: Renderer, targets: Any) -> None:
    folder = workshop.folder / "bundle"
    trainee = trainee_of(workshop, targets=targets)
    write_bundle(folder, trainee, origin_of(workshop), tiny_renderer, {})
    known = find_targets(load_decoder(workshop.base, torch.float32))
    weights = read_peft(folder / "decoder", known)
    chosen = [t.name for t in known if targets == "all-linear" or t.name.endswith(tuple(targets))]
    assert sorted(weights.factors) == sorted(chosen)
    assert weights.rank == 4


def test_text_alone_needs_no_head_and_no_encoder(workshop: Workshop, tiny_renderer: Renderer) -> None:
    path = write_rows(workshop.folder / "text.jsonl", [text_row("a", f"b{i}", "c", "d") for i in range(6)])
    folder = workshop.folder / "bundle"
    trainee = trainee_of(workshop, media=False)
    manifest = write_bundle(folder, trainee, origin_of(workshop, path), tiny_renderer, {})
    assert manifest.modalities == ()
    assert manifest.head_modalities == ()
    assert manifest.components == {"decoder": workshop.base.components["decoder"]}
    assert len(read_probes(folder)) == 4


def test_the_bases_own_head_is_bound_to_where_it_is_relied_upon(
    workshop: Workshop, tiny_renderer: Renderer
) -> None:
    folder = workshop.folder / "bundle"
    trainee = trainee_of(workshop, trains_head=False)
    manifest = write_bundle(folder, trainee, origin_of(workshop), tiny_renderer, {})
    assert manifest.components == workshop.base.components
    assert manifest.head_modalities == ()
    assert manifest.modalities == ("image",)


def test_the_same_adapter_has_the_same_digest(workshop: Workshop, tiny_renderer: Renderer) -> None:
    digests = {
        write_bundle(
            workshop.folder / str(i), trainee_of(workshop), origin_of(workshop), tiny_renderer, {}
        ).digest
        for i in range(2)
    }
    assert len(digests) == 1
    trainee = trainee_of(workshop)
    with torch.no_grad():
        next(iter(trainee.trained().values())).mul_(1.5)
    other = write_bundle(workshop.folder / "x", trainee, origin_of(workshop), tiny_renderer, {})
    assert other.digest not in digests


def test_a_half_written_bundle_is_none(workshop: Workshop, tiny_renderer: Renderer) -> None:
    folder = workshop.folder / "bundle"
    assert finished_bundle(folder) is None
    written = write_bundle(folder, trainee_of(workshop), origin_of(workshop), tiny_renderer, {})
    assert finished_bundle(folder) == written
    (folder / "probes.safetensors").unlink()
    assert finished_bundle(folder) is None


def test_publishing_twice_makes_one_version(workshop: Workshop, tiny_renderer: Renderer) -> None:
    catalog, store, base = workshop.catalog, workshop.store, workshop.base
    folder = workshop.folder / "bundle"
    write_bundle(folder, trainee_of(workshop), origin_of(workshop), tiny_renderer, SCORES)
    job = catalog.create_job("train", "emoji", {})
    first = publish(catalog, store, folder, base, "emoji", job.id)
    assert (first.ref, first.metrics, first.job_id) == ("emoji@1", SCORES, job.id)
    # even if what another attempt made differs in its last bits
    write_bundle(folder, trainee_of(workshop, r=2), origin_of(workshop), tiny_renderer, SCORES)
    assert publish(catalog, store, folder, base, "emoji", job.id) == first
    assert len(catalog.get_adapter("emoji").versions) == 1
    other = catalog.create_job("train", "emoji", {})
    assert publish(catalog, store, folder, base, "emoji", other.id).ref == "emoji@2"
    assert verify(store.fetch(first.digest)).digest == first.digest


def test_an_adapter_of_another_base_is_refused(workshop: Workshop, tiny_renderer: Renderer) -> None:
    catalog = workshop.catalog
    folder = workshop.folder / "bundle"
    written = write_bundle(folder, trainee_of(workshop), origin_of(workshop), tiny_renderer, {})
    catalog.put_base("other", "d" * 64, {"decoder": "e" * 64}, "/elsewhere")
    facts: dict[str, Any] = {"components": {}, "modalities": [], "lineage": {}, "metrics": {}}
    catalog.register_version("emoji", "f" * 64, base="other", **facts)
    job = catalog.create_job("train", "emoji", {})
    with pytest.raises(ConflictError, match="belongs to base 'other'"):
        publish(catalog, workshop.store, folder, workshop.base, "emoji", job.id)
    assert written.digest


def test_a_run_in_bfloat16_publishes_float32_probes(workshop: Workshop, tiny_renderer: Renderer) -> None:
    folder = workshop.folder / "bundle"
    trainee = trainee_of(workshop)
    assert load_head(workshop.base.heads["image"]).up.weight.dtype == torch.float32
    write_bundle(folder, trainee, origin_of(workshop), tiny_renderer, {})
    assert all(probe.logits.dtype == torch.float32 for probe in read_probes(folder))
    # the run's own model is left as it was
    assert all(parameter.requires_grad for parameter in trainee.head("image").parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_published_as_plain_lora(workshop: Workshop, tiny_renderer: Renderer, rslora: bool) -> None:
    """What was trained over the rest of the layers answers as what serves the layers as they were."""
    torch.manual_seed(0)
    lora = {"r": 3, "alpha": 7, "dropout": 0, "init": "pissa", "use_rslora": rslora}
    origin = origin_of(workshop, lora=lora)
    trainee = build_trainee(
        workshop.base, origin.spec, torch.float32, modalities={"image"}, learned={"image"}
    )
    tokens = torch.arange(5, 25)[None]
    base = load_decoder(workshop.base, torch.float32)
    with torch.no_grad():
        own, start = (model(input_ids=tokens).logits for model in (base, trainee.eval().decoder))
        torch.testing.assert_close(start, own, atol=1e-4, rtol=1e-4)  # nothing is learned yet
        for name, parameter in trainee.lora_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name in trainee.trained()
        expected = trainee.decoder(input_ids=tokens).logits
        assert (expected - own).abs().max() > 0.1
        folder = workshop.folder / "bundle"
        write_bundle(folder, trainee, origin, tiny_renderer, SCORES)
        plain = PeftModel.from_pretrained(load_decoder(workshop.base, torch.float32), str(folder / "decoder"))
        torch.testing.assert_close(plain(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert read_peft(folder / "decoder", find_targets(base)).rank == 6
