"""Training on CUDA: the values and gradients of the CPU, a loss that falls, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from okavango.modalities.base import Base, load_decoder, load_tokenizer
from okavango.modalities.content import Media, Message, Text
from okavango.modalities.projector import HeadSpec, new_head
from okavango.modalities.prompt import Renderer
from okavango.modalities.tiny import write_tiny_base
from okavango.training.checkpoint import Checkpoints
from okavango.training.collate import Row, collate, render_row
from okavango.training.dataset import Example
from okavango.training.evaluate import Question, answer_questions, held_out_loss
from okavango.training.loop import Loop, TrainingSet, data_order, seed_everything
from okavango.training.lora import attach_lora
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor, Reason, Stopped
from okavango.training.objective import answer_loss
from okavango.training.packing import ATTENTION
from okavango.training.ranks import join
from okavango.training.spec import TrainSpec, parse_spec
from okavango.training.tight import Tight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")

HEAD = HeadSpec(in_width=24, out_width=64, grid=(4, 4), tokens=4, hidden=32)
NAMES = ("red fox", "blue car", "big tree", "small cat", "hot tea", "old map", "ice cube", "wet dog")
SYSTEM = Message("system", (Text("You answer in a few words, all of them about the picture."),))


def conversation(i: int) -> Example:
    # no encoder: open_clip is not everywhere where a GPU is
    asked = Message("user", (Media("image", b"picture %d" % i), Text("What is this" + "?" * (1 + i % 3))))
    return Example((SYSTEM, asked, Message("assistant", (Text(NAMES[i]),))), i + 1)


def features(modality: str, digest: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(digest[:12], 16))
    return torch.randn(1, HEAD.tokens, HEAD.in_width, generator=generator)


def specification(**values: object) -> TrainSpec:
    quick = {"base": "tiny", "data": "unused", "name": "x", "steps": 60, "batch_size": 8, "lr": 1e-2}
    return parse_spec(quick | {"lora": {"r": 8, "dropout": 0.0}, "label_smoothing": 0.0} | values)


class Layouts:
    def of(self, medium: Media) -> tuple[int]:
        return (HEAD.tokens,)


class Bench:
    """The tiny base, eight rows with pictures, and trainees that all start alike."""

    def __init__(self, folder: Path) -> None:
        self.base: Base = write_tiny_base(folder / "base", image=False)
        self.renderer = Renderer(load_tokenizer(self.base), Layouts())
        self.examples = [conversation(i) for i in range(len(NAMES))]
        self.rows: list[Row] = [render_row(example, self.renderer, None) for example in self.examples]

    def trainee(self, device: str, dtype: torch.dtype, spec: TrainSpec) -> Trainee:
        seed_everything(0)
        decoder = load_decoder(self.base, dtype, attention=ATTENTION)
        model = attach_lora(decoder, spec.lora, self.base.name)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return Trainee(model, {"image": new_head(HEAD, 0.2)}, {"image"}).to(device).train()

    def loop(self, folder: Path, dtype: torch.dtype, spec: TrainSpec) -> Loop:
        trainee = self.trainee("cuda", dtype, spec)
        data = TrainingSet(self.rows, features)
        steps = spec.total_steps(data_order(self.rows, spec).steps_an_epoch)
        return Loop(trainee, data, spec, steps, join(), Checkpoints(folder, "same"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def learned(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in loop._parameters.items()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 8e-2)])
def test_values_and_gradients_are_those_of_the_cpu(bench: Bench, dtype: torch.dtype, bound: float) -> None:
    batch = collate(bench.rows, features)
    assert batch.layout.shared > 20
    found: list[dict[str, torch.Tensor]] = []
    for device, precision in (("cpu", torch.float32), ("cuda", dtype)):
        trainee = bench.trainee(device, precision, specification())
        own = trainee.batch(bench.rows, features)
        assert isinstance(own.layout, Tight) == (precision == torch.bfloat16)
        logits = trainee(own)
        answer_loss(logits, own.labels).backward()
        grads = {name: parameter.grad.cpu() for name, parameter in trainee.trained().items()}
        found.append({"logits": logits.detach().float().cpu()[: len(batch.labels)], **grads})
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < bound, name


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((found[name] - each).norm() / each.norm().clamp_min(1e-6))
        for name, each in expected.items()
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_replayed_step_is_what_an_eager_one_is(bench: Bench, dropout: float) -> None:
    lora = {"r": 8, "dropout": dropout}
    recorded, plain = (bench.trainee("cuda", torch.bfloat16, specification(lora=lora)) for _ in range(2))
    plain._has_looked_for_graphs = True  # and found none
    for turn, rows in enumerate((bench.rows, bench.rows[:4] * 2, bench.rows[:2], bench.rows, bench.rows[:2])):
        outcomes = []
        for trainee in (recorded, plain):
            torch.manual_seed(turn)
            trainee.zero_grad()
            loss = trainee.loss(trainee.batch(rows, features), smoothing=0.1)
            (loss / 7).backward()
            grads = {name: parameter.grad.clone() for name, parameter in trainee.trained().items()}
            # what is drawn after a step is drawn alike, too
            outcomes.append({"loss": loss.detach(), "next": torch.rand(4, device="cuda"), **grads})
        errors = relative_errors(*outcomes)
        # the one scales gradients when they are there, the other what they come from, in bfloat16
        assert max(errors.values()) < 3e-2, (turn, errors)
        assert errors["loss"] == errors["next"] == 0
    assert recorded._graphs is not None
    assert len(recorded._graphs._recorded) == 2


def test_gradients_of_several_batches_add_up(bench: Bench) -> None:
    trainee = bench.trainee("cuda", torch.bfloat16, specification())
    for rows in (bench.rows[:4], bench.rows[4:]):
        trainee.loss(trainee.batch(rows, features)).backward()
    halves = {name: parameter.grad.clone() for name, parameter in trainee.trained().items()}
    trainee.zero_grad()
    trainee.loss(trainee.batch(bench.rows, features)).backward()
    whole = {name: parameter.grad.clone() for name, parameter in trainee.trained().items()}
    assert max(relative_errors(halves, whole).values()) < 2e-2


def test_a_backward_pass_that_comes_too_late_is_noticed(bench: Bench) -> None:
    trainee = bench.trainee("cuda", torch.bfloat16, specification())
    first, second = (trainee.loss(trainee.batch(rows, features)) for rows in (bench.rows[:4], bench.rows[4:]))
    second.backward()
    with pytest.raises(AssertionError, match="before this one's backward pass"):
        first.backward()


def test_eight_pictures_are_learned_by_heart_in_bfloat16(bench: Bench, tmp_path: Path) -> None:
    spec = specification(steps=150, max_new_tokens=12)
    loop = bench.loop(tmp_path, torch.bfloat16, spec)
    assert loop._trainee.device.type == "cuda"
    assert held_out_loss(loop._trainee, loop._data, loop.spec) > 1
    loop.run(Monitor())
    assert held_out_loss(loop._trainee, loop._data, loop.spec) < 0.1
    questions = [
        Question(bench.renderer.prompt(example.messages[:-1]), NAMES[i], "", i + 1)
        for i, example in enumerate(bench.examples)
    ]
    answers = answer_questions(loop._trainee, questions, bench.renderer, features, spec, 512, Monitor())
    assert [sample.answer for sample in answers] == list(NAMES)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_stopped_run_goes_on(bench: Bench, tmp_path: Path, dtype: torch.dtype, bound: float) -> None:
    spec = specification(steps=12, lora={"r": 8, "dropout": 0.2})
    unbroken = bench.loop(tmp_path / "unbroken", dtype, spec)
    unbroken.run(Monitor())
    monitor = Monitor()
    monitor.stop(Reason.INTERRUPT)
    with pytest.raises(Stopped):
        bench.loop(tmp_path / "broken", dtype, spec).run(monitor)
    resumed = bench.loop(tmp_path / "broken", dtype, spec)
    checkpoint = Checkpoints(tmp_path / "broken", "same").latest()
    assert checkpoint is not None
    assert checkpoint.step == 1
    resumed.resume(checkpoint)
    resumed.run(Monitor())
    errors = relative_errors(learned(resumed), learned(unbroken))
    assert max(errors.values()) < bound, errors
