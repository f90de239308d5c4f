"""Pretrained vision-language checkpoints as bases: the same tokens as transformers' own generate."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixtures import FAMILIES, write_checkpoint
from PIL import Image
from training_fixtures import Workshop
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from okavango.modalities.base import Base, read_base, verify_base
from okavango.modalities.checkpoint import add_checkpoint
from okavango.modalities.content import Media, Message, Text
from okavango.modalities.encoders import make_renderer
from okavango.modalities.head_files import head_specs
from okavango.modalities.tiny_bundle import picture_bytes, write_tiny_bundle
from okavango.platform.bundle import read_manifest
from okavango.platform.cli import app
from okavango.platform.errors import BindError, ConfigError, PromptError, UnsupportedError
from okavango.serving.adapters.gate import ParityGate
from okavango.serving.engine import Engine, EngineOptions
from okavango.serving.types import AdapterRef, Request, SamplingParams
from okavango.training.dataset import open_dataset
from okavango.training.monitor import Monitor
from okavango.training.worker import run_job, submit

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
BRIEF = SamplingParams(max_tokens=6, temperature=0)


def png(seed: int, *size: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture_bytes(seed))).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


WIDE, TALL, SMALL = png(1, 60, 36), png(2, 10, 40), png(3, 16, 16)
# by role, what is said: a str is text, bytes are a picture
CONVERSATIONS: list[list[tuple[str, tuple[str | bytes, ...]]]] = [
    [("user", (SMALL, "What is it?"))],
    [("user", ("Which of ", WIDE, TALL, " is older?"))],
    [("user", (WIDE, "What is it?")), ("assistant", ("A tile.",)), ("user", ("And ", SMALL, " this?"))],
    [("system", ("Be brief.",)), ("user", ("Hello!",))],
]


def ours(conversation: list[tuple[str, tuple[str | bytes, ...]]]) -> list[Message]:
    return [
        Message(role, tuple(Text(each) if isinstance(each, str) else Media("image", each) for each in said))
        for role, said in conversation
    ]


def theirs(conversation: list[tuple[str, tuple[str | bytes, ...]]]) -> list[dict[str, Any]]:
    def part(each: str | bytes) -> dict[str, Any]:
        if isinstance(each, str):
            return {"type": "text", "text": each}
        return {"type": "image", "image": Image.open(io.BytesIO(each)).convert("RGB")}

    return [{"role": role, "content": [part(each) for each in said]} for role, said in conversation]


class Folder:
    def __init__(self, folder: Path) -> None:
        self.folder, self.digest = folder, read_manifest(folder).digest

    def fetch(self, digest: str) -> Path:
        assert digest == self.digest
        return self.folder


@pytest.fixture(scope="module")
def base_of(
    checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Base]:
    bases = tmp_path_factory.mktemp("bases")
    made: dict[str, Base] = {}

    def get(family: str) -> Base:
        if family not in made:
            made[family] = add_checkpoint(bases, family, str(checkpoints(family)))
        return made[family]

    return get


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def started(base: Base, source: Any = None, **options: Any) -> Engine:
        own = {"dtype": "float32", "kv_bytes": 1 << 23, "kernels": None, **options}
        made.append(Engine(base, source, EngineOptions(**own)))
        made[-1].start()
        return made[-1]

    yield started
    for engine in made:
        engine.stop()


async def tokens(engine: Engine, request: Request) -> list[int]:
    found: list[int] = []
    async for event in engine.stream(request):
        if event.error is not None:
            raise event.error
        found += event.tokens
    return found


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    import asyncio

    async def all_at_once() -> list[list[int]]:
        return list(await asyncio.gather(*(tokens(engine, request) for request in requests)))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_answers_are_transformers_own(
    family: str,
    checkpoints: Callable[[str], Path],
    base_of: Callable[[str], Base],
    start: Callable[..., Engine],
    tmp_path: Path,
) -> None:
    base, folder = base_of(family), checkpoints(family)
    verify_base(base)
    assert base.heads["image"].trained
    write_tiny_bundle(tmp_path / "adapter", base, seed=3, rank=4, head=False, probes=False)
    source = Folder(tmp_path / "adapter")
    engine = start(base, source)
    processor: Any = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for conversation in CONVERSATIONS:
        inputs = processor.apply_chat_template(
            theirs(conversation),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        rendered = engine.renderer.prompt(ours(conversation))
        shown = list(rendered.tokens)
        for span in rendered.spans:
            shown[span.start : span.end] = [model.config.image_token_id] * span.length
        assert shown == inputs["input_ids"][0].tolist()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        expected.append(out[0, len(shown) :].tolist())
    # else the pictures tell nothing
    assert len({tuple(each) for each in expected}) == len(expected)
    prompts = [engine.renderer.prompt(ours(conversation)) for conversation in CONVERSATIONS]
    alone = [
        answers(engine, [Request(f"alone {i}", prompt, None, GREEDY)])[0] for i, prompt in enumerate(prompts)
    ]
    assert alone == expected
    adapter = AdapterRef("adapter", 1, source.digest)
    mixed = [
        Request(f"mixed {i} {ref is None}", prompt, ref, GREEDY)
        for i, prompt in enumerate(prompts)
        for ref in (None, adapter)
    ]
    found = answers(engine, mixed)
    assert found[::2] == expected
    # in steps that are shorter than a picture, and with little memory
    assert answers(start(base, source, max_sequences=3, max_step_tokens=7, kv_bytes=1 << 18), mixed) == found
    assert all(adapted != plain for plain, adapted in zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"encoders": {"image": {"r": 2}}, "views": 0},
        {"heads": {"image": {"kind": "resampler", "tokens": 2, "hidden": 64}}},
    ],
    ids=["tower and connector adapted", "another head behind the connector"],
)
@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava", "qwen2_5_vl"])
def test_adapters_that_are_trained_over_it_pass_the_gate(
    workshop: Workshop,
    base_of: Callable[[str], Base],
    start: Callable[..., Engine],
    family: str,
    values: dict[str, Any],
) -> None:
    base = base_of(family)
    shutil.copytree(base.folder, workshop.settings.bases / family)
    over = replace(workshop, base=read_base(workshop.settings.bases / family))
    held_out = workshop.folder / "pictures.jsonl"
    job = submit(over.catalog, over.settings, over.spec(steps=2, eval=held_out, max_new_tokens=6, **values))
    outcome = run_job(over.catalog, over.store, over.settings, job.id, Monitor())
    bundle = over.store.fetch(outcome.version.digest)
    assert ParityGate(over.base).check(bundle).verification["float32"] < 1e-4
    manifest = read_manifest(bundle)
    assert manifest.encoder_modalities == (("image",) if "encoders" in values else ())
    # what the job answered at its end, a batch at a time, is what is served
    dataset, source = open_dataset(held_out), Folder(bundle)
    engine = start(over.base, source)
    renderer = make_renderer(over.base, engine.tokenizer, head_specs(bundle, manifest))
    asked = [
        Request(
            f"{i}", renderer.prompt(dataset.row(i).messages[:1]), AdapterRef("x", 1, manifest.digest), BRIEF
        )
        for i in range(len(dataset))
    ]
    found = [engine.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers(engine, asked)]
    assert found == [sample.answer for sample in outcome.samples]


def test_a_job_that_nothing_could_learn_from_is_refused(
    workshop: Workshop, base_of: Callable[[str], Base]
) -> None:
    shutil.copytree(base_of("llava").folder, workshop.settings.bases / "llava")
    spec = workshop.spec(base="llava", lora={"train": False})
    job = submit(workshop.catalog, workshop.settings, spec)
    with pytest.raises(ConfigError, match="pass on what its encoder gives"):
        run_job(workshop.catalog, workshop.store, workshop.settings, job.id, Monitor())


def test_what_passes_for_a_picture_in_a_text_is_refused(
    base_of: Callable[[str], Base], start: Callable[..., Engine]
) -> None:
    engine = start(base_of("llava"))
    with pytest.raises(PromptError, match="the text holds <image>"):
        engine.renderer.prompt([Message("user", (Text("a <image> b"),))])


def test_the_command_makes_one_and_wants_no_parts_beside(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OKAVANGO_CACHE", str(tmp_path))
    named = ["base", "add", "seeing", "--checkpoint", str(checkpoints("internvl"))]
    refused = CliRunner().invoke(app, [*named, "--image-tiles", "4"])
    assert refused.exit_code == 1
    assert "--image-tiles: a checkpoint brings all parts" in refused.output
    done = CliRunner().invoke(app, named)
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["base", "show", "seeing", "--verify"])
    assert shown.exit_code == 0, shown.output
    assert "every component is as its digest says" in shown.output
    neither = CliRunner().invoke(app, ["base", "add", "other"])
    assert "a base needs a decoder" in neither.output


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        ("family", UnsupportedError, "attention of their own"),
        ("template", ConfigError, "no chat template"),
        ("blind template", ConfigError, "shows <image> 0 times"),
        ("weights", BindError, "weights are missing"),
        ("processor", ConfigError, "transformers cannot load it"),
        ("config", ConfigError, "not a model of transformers"),
    ],
)
def test_what_cannot_be_a_base_is_refused_whole(
    tmp_path: Path, spoil: str, error: type[Exception], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llava")
    match spoil:
        case "family":
            (folder / "config.json").write_text('{"model_type": "mllama"}')
        case "template":
            (folder / "chat_template.jinja").unlink()
        case "blind template":
            (folder / "chat_template.jinja").write_text("{% for m in messages %}hello{% endfor %}")
        case "weights":
            from safetensors.torch import load_file, save_file

            tensors = load_file(folder / "model.safetensors")
            del tensors[next(name for name in tensors if "multi_modal_projector.linear_1.weight" in name)]
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        case "processor":
            (folder / "processor_config.json").write_text("{")
        case "config":
            (folder / "config.json").unlink()
    with pytest.raises(error, match=message):
        add_checkpoint(tmp_path / "bases", "made", str(folder))
    assert not (tmp_path / "bases" / "made").exists()
