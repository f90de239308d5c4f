"""What a job trains: LoRA factors and a projection head, around a frozen decoder."""

# Shapes: T, L as in collate; M media, E tokens a medium, C encoder width, D decoder width, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from okavango.modalities.base import Base, load_decoder, load_head
from okavango.modalities.embed import place
from okavango.modalities.precision import resolve_dtype
from okavango.modalities.projector import ProjectionHead
from okavango.training.collate import Batch
from okavango.training.lora import attach_lora
from okavango.training.packing import ATTENTION, packed
from okavango.training.spec import LoraSpec


class Trainee(nn.Module):
    """The decoder in the run's precision; LoRA factors and head in float32.

    Attributes:
        head: the image head; None for a base without an image encoder.
        trains_head: whether the head learns; otherwise it is the base's own.
    """

    def __init__(self, decoder: PeftModel, head: ProjectionHead | None, *, trains_head: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head
        self.trains_head = trains_head and head is not None
        if head is not None:
            head.requires_grad_(self.trains_head)
        base: Any = decoder.get_base_model()
        self._layers: int = base.config.get_text_config().num_hidden_layers

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    def forward(self, batch: Batch) -> Tensor:
        """Logits [L, V] of the tokens that are to be predicted."""
        with packed(batch.layout, self._layers):
            output = self.decoder(
                inputs_embeds=self.embed(batch),
                position_ids=batch.layout.positions(self.device),
                use_cache=False,
                logits_to_keep=batch.predicting,
            )
        return output.logits[0]

    def embed(self, batch: Batch) -> Tensor:
        """[1, T, D]: the tokens' embeddings, with media in their spans."""
        embeddings: Tensor = self.embedding()(batch.tokens)[None]
        if batch.features is not None:
            assert self.head is not None
            place(embeddings, 0, batch.spans, list(self.head(batch.features)))
        return embeddings

    def embedding(self) -> nn.Module:
        """The decoder's token embeddings."""
        module: nn.Module = self.decoder.get_input_embeddings()
        return module

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.decoder.named_parameters():
            if parameter.requires_grad:
                yield f"decoder.{name}", parameter

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.head is not None and self.trains_head:
            for name, parameter in self.head.named_parameters():
                yield f"head.{name}", parameter

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by name, in a fixed order."""
        return dict([*self.lora_parameters(), *self.head_parameters()])


def build_trainee(
    base: Base,
    lora: LoraSpec,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    media: bool,
    trains_head: bool,
) -> Trainee:
    """A fresh trainee; its factors come from torch's global random state.

    Args:
        media: whether any data hold some, so that a head is needed.
        trains_head: whether it learns; one that sees no media in training has nothing to learn from.
    """
    decoder = load_decoder(base, dtype, device, attention=ATTENTION)
    model = attach_lora(decoder, lora, base.name)
    head = load_head(base.heads["image"]) if media else None
    return Trainee(model, head, trains_head=trains_head).to(device).train()


def precision(name: str, device: str = "cpu") -> torch.dtype:
    """A specification's precision on a device: "auto" is bf16 where that is native."""
    return resolve_dtype("bfloat16" if name == "bf16" else name, device)
