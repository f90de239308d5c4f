"""One side of the comparison that training.py makes, in a process of its own: steps, and what they took.

Prints {"tokens_per_second": …, "seconds": …, "peak": …, "valid_loss": …, "steps": …}.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import random
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okavango.modalities.content import Media, Message, Text
from okavango.training.collate import LoadMedium, Row
from okavango.training.loop import Loop, TrainingSet, seed_everything
from okavango.training.model import Trainee
from okavango.training.monitor import Monitor
from okavango.training.ranks import join
from okavango.training.spec import TrainSpec, parse_spec

WARM = 3  # steps before the clock counts
HELD_OUT = 64
MOST_CHARACTERS = 1200
SYSTEM = "You know Python's standard library by heart, and answer with its own words."
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Task:
    """What both sides train on.

    Attributes:
        decoder: loads it, with one of transformers' attentions.
        media: by digest, the bytes of rows' pictures.
        base: where encoder and head come from; None for a random shape, which has neither.
    """

    rows: Sequence[Row]
    held_out: Sequence[Row]
    decoder: Callable[[str], Any]
    spec: TrainSpec
    media: dict[str, Media]
    base: Any
    device: str
    dtype: torch.dtype


@dataclass
class Clock:
    """When steps ended. `tokens`: of each, padding left out."""

    ends: list[float]
    tokens: list[int]

    def rate(self) -> float:
        seconds = self.ends[-1] - self.ends[WARM - 1]
        return sum(self.tokens[WARM:]) / seconds

    def seconds(self) -> float:
        pairs = zip(self.ends[WARM - 1 :], self.ends[WARM:], strict=False)
        return statistics.median(end - begin for begin, end in pairs)


def main() -> None:
    asked = json.loads(sys.argv[1])
    task = random_task(asked) if asked["base"] in SHAPES else real_task(asked)
    clock = Clock([], [])
    valid_loss = (ours if asked["side"] == "okavango" else plain)(task, clock)
    found = {"tokens_per_second": clock.rate(), "seconds": clock.seconds(), "steps": len(clock.ends)}
    print(json.dumps({**found, "peak": peak(task.device), "valid_loss": valid_loss}))


def ours(task: Task, clock: Clock) -> float:
    """The training loop of `okavango train`; pictures are encoded before, as it does."""
    from okavango.training.evaluate import held_out_loss
    from okavango.training.packing import ATTENTION

    load = cached_features(task)
    seed_everything(0)
    trainee = trainee_of(task, task.decoder(ATTENTION))
    monitor = Monitor()

    def listen(event: Any) -> None:
        if event.kind == "metrics":
            synchronize(task.device)
            clock.ends.append(time.perf_counter())

    monitor.listeners.append(listen)
    assert task.spec.steps is not None
    with tempfile.TemporaryDirectory() as folder:
        from okavango.training.checkpoint import Checkpoints

        checkpoints = Checkpoints(Path(folder), "benchmark")
        data = TrainingSet(task.rows, load)
        loop = Loop(trainee, data, task.spec, task.spec.steps, join(), checkpoints)
        order = [loop._order.batches(step) for step in range(task.spec.steps)]
        clock.tokens += [sum(task.rows[i].length for batch in step for i in batch) for step in order]
        loop.run(monitor)
    return held_out_loss(trainee, TrainingSet(task.held_out, load), task.spec)


def trainee_of(task: Task, decoder: Any) -> Trainee:
    from okavango.modalities.base import load_head
    from okavango.training.lora import attach_lora

    model = attach_lora(decoder, task.spec.lora, "benchmark")
    heads = {"image": load_head(task.base.heads["image"])} if task.media else {}
    return Trainee(model, heads, heads.keys()).to(task.device).train()


def cached_features(task: Task) -> LoadMedium:
    """Pooled features of all pictures, encoded once."""
    if not task.media:
        return lambda modality, digest: torch.empty(0)
    from okavango.modalities.encoders import decode, encode, load_encoder
    from okavango.modalities.projector import pool

    encoder = load_encoder(task.base.encoders["image"], task.dtype, task.device)
    shape = task.base.heads["image"].spec
    found = {
        digest: pool(encode(encoder, [decode(medium)])[0], shape) for digest, medium in task.media.items()
    }
    return lambda modality, digest: found[digest]


class Plain(nn.Module):
    """What one would write around transformers: encode the pictures of a batch, put them where they belong,
    and leave the rest to the decoder."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        lora = task.spec.lora
        decoder = task.decoder("sdpa").requires_grad_(False)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.decoder = get_peft_model(decoder, config)
        self.config = decoder.config
        self.encoder: Any = None
        if task.media:
            from okavango.modalities.base import load_head
            from okavango.modalities.encoders import load_encoder

            self.head = load_head(task.base.heads["image"]).requires_grad_(True)
            self.encoder = load_encoder(task.base.encoders["image"], task.dtype, task.device)
        self.to(task.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pictures: list[Tensor] | None = None,
        at: Tensor | None = None,
        num_items_in_batch: Any = None,
    ) -> Any:
        embeddings = self.decoder.get_input_embeddings()(input_ids)
        if pictures:
            from okavango.modalities.projector import pool

            with torch.no_grad():
                features = [pool(each.float(), self.head.spec) for each in self.encoder.features(pictures)]
            made = self.head(torch.cat([each.to(input_ids.device) for each in features])).flatten(0, 1)
            assert at is not None
            embeddings = embeddings.clone()
            embeddings[at] = made.to(embeddings.dtype)
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.decoder(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, use_cache=False, **extra
        )


def plain(task: Task, clock: Clock) -> float:
    """transformers' Trainer over PEFT: padded batches, grouped by length, each medium encoded when it
    comes."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seed_everything(0)
    model, spec = Plain(task), task.spec
    padded = Padded(task, model)
    assert spec.steps is not None

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(task.device)
            clock.ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=spec.batch_size,
            max_steps=spec.steps,
            learning_rate=spec.lr,
            lr_scheduler_type="cosine",
            warmup_steps=round(spec.warmup * spec.steps),
            weight_decay=0.0,
            max_grad_norm=spec.clip,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=task.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=spec.seed,
        )
        items = [{"row": i, "input_ids": row.tokens.tolist()} for i, row in enumerate(task.rows)]
        trainer = Trainer(model, arguments, data_collator=padded, train_dataset=items, callbacks=[Ends()])  # type: ignore[arg-type]
        trainer.train()
    clock.tokens += padded.tokens[: len(clock.ends)]
    return padded.loss(task.held_out)


class Padded:
    """Rows as a batch whose shorter ones are filled up."""

    def __init__(self, task: Task, model: Plain) -> None:
        self.task = task
        self.model = model
        self.tokens: list[int] = []

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [self.task.rows[item["row"]] for item in items]
        self.tokens.append(sum(row.length for row in rows))
        return self.batch(rows)

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        length = max(len(row.tokens) for row in rows)
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
        at = torch.zeros(len(rows), length, dtype=torch.bool)
        pictures: list[Tensor] = []
        for i, row in enumerate(rows):
            own = torch.from_numpy(row.tokens).long()
            tokens[i, : len(own)], mask[i, : len(own)] = own, 1
            labels[i, : len(own)] = torch.where(torch.from_numpy(row.loss), own, -100)
            for span, digest in zip(row.spans, row.media, strict=True):
                at[i, span.start : span.end] = True
                pictures.append(self._prepared(digest))
        found = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return {**found, "pictures": pictures, "at": at} if pictures else found

    @torch.no_grad()
    def loss(self, rows: Sequence[Row]) -> float:
        """Mean over the rows' answers' tokens."""
        self.model.eval()
        rows, size = sorted(rows, key=lambda row: row.length), self.task.spec.batch_size
        total = 0.0
        for start in range(0, len(rows), size):
            batch = self.batch(rows[start : start + size])
            moved = {k: v.to(self.task.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            logits = self.model(**moved).logits[:, :-1].flatten(0, 1).float()
            targets = moved["labels"][:, 1:].flatten()
            total += F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        return total / sum(row.answer_tokens for row in rows)

    def _prepared(self, digest: str) -> Tensor:
        from okavango.modalities.encoders import decode

        prepared: Tensor = self.model.encoder.prepare(decode(self.task.media[digest]))
        return prepared


def real_task(asked: dict[str, Any]) -> Task:
    """A base's own decoder; what Python says about itself, with a picture in each row or none."""
    from ours import base_of

    from okavango.modalities.base import load_decoder, load_tokenizer
    from okavango.modalities.encoders import make_renderer
    from okavango.training.build import precision
    from okavango.training.collate import render_row
    from okavango.training.dataset import Example

    base = base_of(asked["base"], Path(asked["folder"]))
    dtype = precision(asked["dtype"], asked["device"])
    renderer = make_renderer(base, load_tokenizer(base))
    rows, media = [], {}
    for number, messages in enumerate(conversations(asked["case"] == "pictures")):
        row = render_row(Example(messages, number + 1), renderer, SYSTEM)
        if row.length <= min(base.decoder.context, 512):
            rows.append(row)
            media |= {medium.digest: medium for message in messages for medium in message.media}
        if len(rows) == asked["rows"] + HELD_OUT:
            break
    spec = spec_of(asked)
    decoder = lambda attention: load_decoder(base, dtype, asked["device"], attention)  # noqa: E731
    return Task(rows[HELD_OUT:], rows[:HELD_OUT], decoder, spec, media, base, asked["device"], dtype)


def random_task(asked: dict[str, Any]) -> Task:
    """A Llama of a known shape with random weights, and rows of random tokens as long as real ones are."""
    import numpy as np
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SHAPES[asked["base"]], max_position_embeddings=2048)
    dtype = torch.bfloat16 if asked["dtype"] == "bf16" else torch.float32
    chance = np.random.default_rng(0)
    rows = []
    for number in range(asked["rows"] + HELD_OUT):
        prompt, answer = 40, int(np.clip(chance.lognormal(4.0, 1.0), 4, 460))
        tokens = np.concatenate([np.arange(20), chance.integers(0, config.vocab_size, prompt - 20 + answer)])
        loss = np.arange(len(tokens)) >= prompt
        rows.append(Row(number + 1, tokens.astype(np.int32), loss, (), ()))

    def decoder(attention: str) -> Any:
        torch.manual_seed(0)
        with torch.device(asked["device"]):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)

    held_out = rows[:HELD_OUT]
    return Task(rows[HELD_OUT:], held_out, decoder, spec_of(asked), {}, None, asked["device"], dtype)


def spec_of(asked: dict[str, Any]) -> TrainSpec:
    own = {"steps": asked["steps"], "batch_size": asked["batch"], "label_smoothing": 0.0, "views": 0}
    quiet = {"save_every": 10**9, "lr": 5e-4}
    return parse_spec(
        {"base": "x", "data": "x", "name": "benchmark", "precision": asked["dtype"], **own, **quiet}
    )


def conversations(with_pictures: bool) -> Iterator[tuple[Message, ...]]:
    """Questions about Python's standard library, answered by its docstrings, in an order that mixes them."""
    found = sorted(documented())
    random.Random(0).shuffle(found)
    for number, (name, text) in enumerate(found):
        question = Text(f"What is {name}?")
        parts = (Media("image", picture(number)), question) if with_pictures else (question,)
        answer = text.split("\n\n")[0][:120] if with_pictures else text[:MOST_CHARACTERS]
        yield Message("user", parts), Message("assistant", (Text(answer),))


def documented() -> Iterator[tuple[str, str]]:
    skipped = ("_", "antigravity", "this", "idlelib", "turtle", "tkinter", "test")
    for module in sorted(sys.stdlib_module_names):
        if module.startswith(skipped):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                members = vars(importlib.import_module(module))
            except ImportError:  # of another system
                continue
        for name, value in sorted(members.items()):
            is_own = getattr(value, "__module__", None) == module and not name.startswith("_")
            if is_own and (inspect.isclass(value) or inspect.isroutine(value)) and inspect.getdoc(value):
                yield f"{module}.{name}", inspect.getdoc(value) or ""


def picture(number: int, side: int = 224) -> bytes:
    """What nobody has seen, as JPEG."""
    from PIL import Image

    generator = torch.Generator().manual_seed(number)
    coarse = torch.randint(0, 256, (14, 14, 3), generator=generator, dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak(device: str) -> int:
    """Bytes: of the GPU's memory that torch took, or resident in this process."""
    if device != "cpu":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
