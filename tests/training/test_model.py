"""The packed, lean forward pass equals transformers and PEFT, row by row, in values and in gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from training_fixtures import picture_row, text_row, write_pictures, write_rows

from okavango.modalities.base import Base, load_decoder, load_head, load_tokenizer
from okavango.modalities.content import Limits
from okavango.modalities.image import ImageEncoder, decode_image
from okavango.modalities.projector import ProjectionHead, pool
from okavango.modalities.prompt import Renderer
from okavango.modalities.tiny import Architecture, write_tiny_base
from okavango.platform.errors import UnsupportedError
from okavango.training.collate import Batch, collate, render_row
from okavango.training.dataset import Dataset, Example, open_dataset
from okavango.training.lora import drop
from okavango.training.model import Trainee, build_trainee, precision
from okavango.training.objective import answer_loss
from okavango.training.packing import Layout, packed
from okavango.training.spec import LoraSpec

pytestmark = pytest.mark.usefixtures("one_thread")
# what float32 sums in another order may differ by, at logits of about 10
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def renderer_of(base: Base) -> Renderer:
    return Renderer(load_tokenizer(base), {name: head.spec.tokens for name, head in base.heads.items()})


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
    encoder = ImageEncoder.load(base.encoders["image"])
    media = [medium for example in dataset.rows() for m in example.messages for medium in m.media]
    pictures = [decode_image(medium.data, Limits()) for medium in media]
    pooled = pool(encoder.encode(pictures), base.heads["image"].spec)
    return dict(zip([medium.digest for medium in media], pooled, strict=True))


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
        vectors = head(features[medium.digest][None])[0]
        pieces += [table(tokens[end : span.start]), vectors.to(table.weight.dtype)]
        end = span.end
    embeddings = torch.cat([*pieces, table(tokens[end:])])[None]
    logits = model(inputs_embeds=embeddings, attention_mask=torch.ones(1, len(tokens))).logits[0]
    at = torch.tensor([i for i, counts in enumerate(rendered.loss) if counts])
    return logits[at - 1], tokens[at]


def trainee_like(base: Base, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> Trainee:
    trainee = build_trainee(base, spec, dtype, media=True, trains_head=True)
    fill(trainee.decoder)
    return trainee


def batch_of(base: Base, dataset: Dataset, features: dict[str, torch.Tensor]) -> Batch:
    rows = [render_row(example, renderer_of(base), None) for example in dataset.rows()]
    return collate(rows, features.__getitem__)


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
    theirs |= {f"head.{name}": p.grad for name, p in head.named_parameters()}
    ours = {name: p.grad for name, p in trainee.trained().items()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad is not None
        assert theirs[name] is not None
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-3, msg=name)


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
    together = trainee(collate(rows, features.__getitem__))
    alone = torch.cat([trainee(collate([row], features.__getitem__)) for row in rows])
    torch.testing.assert_close(together, alone, **CLOSE)


def test_only_what_is_to_learn_learns(tiny_base: Base) -> None:
    spec = LoraSpec(r=4, targets=("q_proj", "v_proj"))
    trainee = build_trainee(tiny_base, spec, torch.float32, media=True, trains_head=False)
    names = set(trainee.trained())
    assert len(names) == 8
    assert all(".q_proj.lora_" in name or ".v_proj.lora_" in name for name in names)
    with_head = build_trainee(tiny_base, spec, torch.float32, media=True, trains_head=True)
    assert {name for name in with_head.trained() if name not in names} == {
        f"head.{name}" for name, _ in load_head(tiny_base.heads["image"]).named_parameters()
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
