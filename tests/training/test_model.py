"""The packed, lean forward pass equals transformers and PEFT, row by row, in values and in gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from plain_varlen import plain_varlen
from training_fixtures import picture_row, text_row, write_pictures, write_rows

from okavango.modalities.base import Base, load_decoder, load_head, load_tokenizer
from okavango.modalities.encoders import decode, encode, load_encoder, make_renderer
from okavango.modalities.projector import ProjectionHead, pool
from okavango.modalities.prompt import Renderer
from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.platform.errors import UnsupportedError
from okavango.training import tight
from okavango.training.build import build_trainee, precision
from okavango.training.collate import Batch, LoadMedium, collate, render_row
from okavango.training.dataset import Dataset, Example, open_dataset
from okavango.training.lora import drop
from okavango.training.memory import MOST_LOGITS
from okavango.training.model import Trainee
from okavango.training.objective import answer_loss
from okavango.training.packing import Layout, packed
from okavango.training.spec import LoraSpec, TrainSpec

pytestmark = pytest.mark.usefixtures("one_thread")
# what float32 sums in another order may differ by, at logits of about 10
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def renderer_of(base: Base) -> Renderer:
    return make_renderer(base, load_tokenizer(base))


def mixed_rows(folder: Path) -> Dataset:
    """Pictures and text, several turns, all beginning alike for a while."""
    write_pictures(folder)
    rows = [
        picture_row("images/0.png", "red fox"),
        picture_row("images/1.png", "a very blue car", "And what is this one?"),
        text_row("What is it?", "a cat", "Really?", "no, it is a dog"),
        picture_row("images/2.png", "tree"),
    ]
    return open_dataset(write_rows(folder / "mixed.jsonl", rows))


def features_of(base: Base, dataset: Dataset) -> dict[str, torch.Tensor]:
    encoder = load_encoder(base.encoders["image"])
    media = [medium for example in dataset.rows() for m in example.messages for medium in m.media]
    features = encode(encoder, [decode(medium) for medium in media])
    head = base.heads["image"].spec
    return {medium.digest: pool(each, head) for medium, each in zip(media, features, strict=True)}


def loader(features: dict[str, torch.Tensor]) -> LoadMedium:
    return lambda modality, digest: features[digest]


def fill(model: torch.nn.Module, seed: int = 5) -> None:
    """Random factors, B included, the same for models with the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def plain_peft(base: Base, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> PeftModel:
    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_decoder(base, dtype), config)
    fill(model)
    return model


def reference_logits(
    model: PeftModel, head: ProjectionHead, example: Example, renderer: Renderer, features: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of one row alone, by transformers' own attention and PEFT's own layers."""
    rendered = renderer.conversation(example.messages)
    tokens = torch.tensor(rendered.tokens)
    pieces, end = [], 0
    table = model.get_input_embeddings()
    for span, medium in zip(rendered.spans, rendered.media, strict=True):
        vectors = head(features[medium.digest])[0]
        pieces += [table(tokens[end : span.start]), vectors.to(table.weight.dtype)]
        end = span.end
    embeddings = torch.cat([*pieces, table(tokens[end:])])[None]
    logits = model(inputs_embeds=embeddings, attention_mask=torch.ones(1, len(tokens))).logits[0]
    at = torch.tensor([i for i, counts in enumerate(rendered.loss) if counts])
    return logits[at - 1], tokens[at]


def build(
    base: Base, lora: LoraSpec, dtype: torch.dtype = torch.float32, *, trains_head: bool = True, **own: Any
) -> Trainee:
    head = {"train": trains_head}
    spec = TrainSpec(base="tiny", data=Path("none"), name="a", lora=lora, head=head, **own)  # type: ignore[arg-type]
    return build_trainee(base, spec, dtype, modalities={"image"}, learned={"image"})


def trainee_like(base: Base, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> Trainee:
    trainee = build(base, spec, dtype)
    fill(trainee.decoder)
    return trainee


def batch_of(base: Base, dataset: Dataset, features: dict[str, torch.Tensor]) -> Batch:
    rows = [render_row(example, renderer_of(base), None) for example in dataset.rows()]
    return collate(rows, loader(features))


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(r=4, alpha=8, dropout=0),
        LoraSpec(
            r=2,
            alpha=6,
            dropout=0,
            use_rslora=True,
            targets=r".*layers\.1\..*|.*h\.1\..*(c_attn|c_proj|c_fc)",
        ),
    ],
    ids=["all-linear", "rslora in one layer"],
)
def test_values_and_gradients_equal_transformers_and_peft(
    tmp_path: Path, architecture: Architecture, spec: LoraSpec
) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    if spec.targets != "all-linear" and architecture != "gpt2":
        spec = spec.model_copy(update={"targets": r".*layers\.1\..*_proj"})
    dataset = mixed_rows(tmp_path)
    features = features_of(base, dataset)
    reference, head = plain_peft(base, spec), load_head(base.heads["image"]).requires_grad_(True)
    wanted = [reference_logits(reference, head, e, renderer_of(base), features) for e in dataset.rows()]

    trainee = trainee_like(base, spec)
    batch = batch_of(base, dataset, features)
    assert batch.layout.shared > 5
    logits = trainee(batch)

    torch.testing.assert_close(logits, torch.cat([each for each, _ in wanted]), **CLOSE)
    assert batch.labels.tolist() == torch.cat([labels for _, labels in wanted]).tolist()
    answer_loss(logits, batch.labels).backward()
    sum(F.cross_entropy(each, labels, reduction="sum") for each, labels in wanted).backward()  # type: ignore[union-attr]
    theirs = {f"decoder.{name}": p.grad for name, p in reference.named_parameters() if p.requires_grad}
    theirs |= {f"heads.image.{name}": p.grad for name, p in head.named_parameters()}
    ours = {name: p.grad for name, p in trainee.trained().items()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad is not None
        assert theirs[name] is not None
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


def gradients(trainee: Trainee, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainee.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainee.trained().items() if p.grad is not None}


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_without_padding_values_and_gradients_are_the_same(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tight, "_varlen", lambda: plain_varlen)
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    dataset = mixed_rows(tmp_path)
    rows = [render_row(example, renderer_of(base), None) for example in dataset.rows()]
    load = loader(features_of(base, dataset))
    trainee = trainee_like(base, LoraSpec(r=4, alpha=8, dropout=0))
    found, expected = (trainee.loss(collate(rows, load, tight=each)) for each in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    ours, padded = gradients(trainee, found), gradients(trainee, expected)
    assert ours.keys() == padded.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_cpu_gets_padded_rows(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    dataset = mixed_rows(tmp_path)
    rows = [render_row(example, renderer_of(base), None) for example in dataset.rows()]
    trainee = build(base, LoraSpec(r=4), torch.bfloat16)
    assert isinstance(trainee.batch(rows, loader(features_of(base, dataset))).layout, Layout)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_the_loss_is_that_of_the_logits_which_are_never_all_there(
    tmp_path: Path, architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    dataset = mixed_rows(tmp_path)
    batch = batch_of(base, dataset, features_of(base, dataset))
    trainee = trainee_like(base, LoraSpec(r=4, targets=r".*(o_proj|attn.c_proj)", dropout=0.3))
    head: Any = trainee.base_decoder.get_output_embeddings()
    monkeypatch.setitem(MOST_LOGITS, "cpu", 3 * head.out_features)
    heights: list[int] = []
    losses, grads, state = [], [], torch.get_rng_state()
    for parted in (False, True):
        torch.set_rng_state(state)  # the same are dropped
        if parted:
            head.register_forward_hook(
                lambda _, __, logits: heights.append(logits.numel() // logits.shape[-1])
            )
        loss = (
            trainee.loss(batch, smoothing=0.1) if parted else answer_loss(trainee(batch), batch.labels, 0.1)
        )
        losses.append(loss.detach())
        grads.append(gradients(trainee, loss))
    torch.testing.assert_close(losses[1], losses[0])
    assert grads[0].keys() == grads[1].keys()
    assert all(name.startswith(("decoder.", "heads.")) for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4, msg=name)
    assert max(heights) == 3
    assert len(batch.labels) > 9


def test_logits_that_are_capped_or_learned_are_made_as_they_are(tmp_path: Path, tiny_base: Base) -> None:
    dataset = mixed_rows(tmp_path)
    batch = batch_of(tiny_base, dataset, features_of(tiny_base, dataset))
    learned = trainee_like(tiny_base, LoraSpec(r=4, dropout=0))
    head: Any = learned.base_decoder.get_output_embeddings()
    head.weight.requires_grad_(True)
    gradients(learned, learned.loss(batch))
    assert head.weight.grad is not None
    assert torch.equal(learned.loss(batch), answer_loss(learned(batch), batch.labels))

    capped = trainee_like(tiny_base, LoraSpec(r=4, dropout=0))
    plain, model = capped.base_decoder.forward, capped.base_decoder

    def forward(*inputs: Any, **options: Any) -> Any:
        output = plain(*inputs, **options)
        output.logits = torch.tanh(output.logits / 2)
        return output

    model.forward = forward
    expected = answer_loss(capped(batch), batch.labels)
    assert torch.equal(capped.loss(batch), expected)
    assert gradients(capped, capped.loss(batch))


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_layers_computed_anew_learn_the_same_from_less(tmp_path: Path, architecture: Architecture) -> None:
    base = write_tiny_base(tmp_path / "base", architecture=architecture)
    dataset = mixed_rows(tmp_path)
    batch = batch_of(base, dataset, features_of(base, dataset))

    def learned(**own: Any) -> tuple[dict[str, torch.Tensor], int]:
        lora = LoraSpec(r=4, dropout=0.4, targets=r".*(o_proj|attn.c_proj)")
        trainee = build(base, lora, **own)
        fill(trainee.decoder)
        torch.manual_seed(3)
        kept = 0

        def keep(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = answer_loss(trainee(batch), batch.labels)
        loss.backward()
        grads = {name: p.grad for name, p in trainee.trained().items()}
        return {name: grad for name, grad in grads.items() if grad is not None}, kept

    plain, kept_by_plain = learned()
    anew, kept_anew = learned(recompute=True)
    assert plain.keys() == anew.keys()
    assert all(torch.equal(anew[name], grad) for name, grad in plain.items())
    assert kept_anew < kept_by_plain / 2


def test_in_bfloat16_it_is_as_near_to_float32_as_peft_is(tmp_path: Path, tiny_base: Base) -> None:
    spec = LoraSpec(r=4, alpha=8, dropout=0)
    dataset = mixed_rows(tmp_path)
    features = features_of(tiny_base, dataset)
    renderer, head = renderer_of(tiny_base), load_head(tiny_base.heads["image"])

    def errors(dtype: torch.dtype) -> torch.Tensor:
        model = plain_peft(tiny_base, spec, dtype)
        found = [reference_logits(model, head, e, renderer, features)[0] for e in dataset.rows()]
        return torch.cat(found).float().detach()

    exact = errors(torch.float32)
    theirs = (errors(torch.bfloat16) - exact).norm() / exact.norm()
    trainee = trainee_like(tiny_base, spec, torch.bfloat16)
    assert {parameter.dtype for parameter in trainee.trained().values()} == {torch.float32}
    ours = (trainee(batch_of(tiny_base, dataset, features)).float() - exact).norm() / exact.norm()
    assert 0 < ours < 2 * theirs


def test_padding_and_company_change_nothing(tmp_path: Path, tiny_base: Base) -> None:
    dataset = mixed_rows(tmp_path)
    features = features_of(tiny_base, dataset)
    trainee = trainee_like(tiny_base, LoraSpec(r=4)).eval()
    rows = [render_row(example, renderer_of(tiny_base), None) for example in dataset.rows()]
    together = trainee(collate(rows, loader(features)))
    alone = torch.cat([trainee(collate([row], loader(features))) for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_only_what_is_to_learn_learns(tiny_base: Base) -> None:
    spec = LoraSpec(r=4, targets=("q_proj", "v_proj"))
    trainee = build(tiny_base, spec, trains_head=False)
    names = set(trainee.trained())
    assert len(names) == 8
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in names)
    with_head = build(tiny_base, spec)
    assert {name for name in with_head.trained() if name not in names} == {
        f"heads.image.{name}" for name, _ in load_head(tiny_base.heads["image"]).named_parameters()
    }


@pytest.mark.parametrize("shape", [(1000, 50), (3, 7, 11)])
def test_dropout_drops_its_share_and_keeps_the_mean(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.full(shape, 2.0, requires_grad=True)
    y = drop(x, 0.3)
    assert y.unique().tolist() == [0.0, pytest.approx(2 / 0.7)]
    share = (y == 0).float().mean().item()
    assert abs(share - 0.3) < 3 * (0.21 / x.numel()) ** 0.5
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    torch.manual_seed(0)
    assert torch.equal(drop(x, 0.3), y)
    assert torch.equal(drop(x, 0), x)


def test_dropout_is_on_in_training_and_off_elsewhere(tmp_path: Path, tiny_base: Base) -> None:
    dataset = mixed_rows(tmp_path)
    batch = batch_of(tiny_base, dataset, features_of(tiny_base, dataset))
    trainee = trainee_like(tiny_base, LoraSpec(r=4, dropout=0.5))
    with torch.no_grad():
        assert not torch.equal(trainee(batch), trainee(batch))
        trainee.eval()
        assert torch.equal(trainee(batch), trainee(batch))


def test_a_decoder_that_goes_round_the_attention_is_noticed() -> None:
    with pytest.raises(UnsupportedError, match="0 of the decoder's 2 layers"), packed(Layout(0, 1, 4), 2):
        pass


def test_precision_names() -> None:
    assert precision("bf16") == torch.bfloat16
    assert precision("float32") == torch.float32
    assert precision("auto") in (torch.bfloat16, torch.float32)
