"""What a job trains: LoRA factors and projection heads, around a frozen decoder and its encoders."""

# Shapes: T, L as in collate; M embeddings of a medium, D decoder width, V vocabulary

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from okavango.modalities.embed import place
from okavango.modalities.embedding import EmbeddingHead
from okavango.modalities.encoders import Encoder
from okavango.modalities.precision import PARITY_BOUNDS, relative_error
from okavango.modalities.projector import ProjectionHead, pool
from okavango.modalities.prompt import Span
from okavango.modalities.rope import rope_of
from okavango.platform.errors import UnsupportedError
from okavango.training.collate import Batch, LoadMedium, Row, collate
from okavango.training.graphs import Graphs
from okavango.training.memory import rows_of_logits
from okavango.training.objective import answer_loss, parted_loss
from okavango.training.packing import packed
from okavango.training.tight import Tight

log = logging.getLogger(__name__)

Made = Mapping[str, Sequence[Tensor]]
"""By modality, what became of each medium: [M, D]."""


@dataclass(frozen=True)
class AdaptedEncoder:
    """An encoder whose layers LoRA adapts: `peft` holds the factors, `encoder` runs through them."""

    encoder: Encoder
    peft: PeftModel


class Trainee(nn.Module):
    """The decoder in the run's precision, with LoRA or as it is; LoRA factors and heads in float32.

    Attributes:
        heads: by modality, those that the data need.
        trained_heads: of them, those that learn; the others are the base's own.
        encoders: by modality, those that learn.
        space: where a joint objective compares media and texts; None without one.
        start: factors that the decoder's began as, where these are not to be in the adapter: see pissa.
        recomputes: the decoder's layers keep their inputs alone for the backward pass.
    """

    def __init__(
        self,
        decoder: PeftModel | PreTrainedModel,
        heads: Mapping[str, ProjectionHead],
        trained_heads: Collection[str] = (),
        encoders: Mapping[str, AdaptedEncoder] | None = None,
        space: EmbeddingHead | None = None,
    ) -> None:
        super().__init__()
        self.decoder: Any = decoder
        self.heads = nn.ModuleDict(dict(heads))
        self.trained_heads = frozenset(trained_heads)
        self.encoders = dict(encoders or {})
        self.space = space
        self.start: dict[str, Tensor] | None = None
        self.recomputes = False
        self._ends_in_head: bool | None = None  # looked at when the first loss is asked for
        self._graphs: Graphs | None = None
        self._has_looked_for_graphs = False
        self._encoder_factors = nn.ModuleDict({name: each.peft for name, each in self.encoders.items()})
        for name, head in self.heads.items():
            head.requires_grad_(name in self.trained_heads)
        self._rope = rope_of(decoder)
        self._layers: int = self.base_decoder.config.get_text_config().num_hidden_layers

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def base_decoder(self) -> PreTrainedModel:
        """The decoder's model, inside its LoRA if it has one."""
        model: PreTrainedModel = self.decoder
        return cast("PreTrainedModel", model.get_base_model()) if isinstance(model, PeftModel) else model

    def train(self, mode: bool = True) -> Trainee:
        """Encoders stay as they are served: no statistics of theirs move."""
        super().train(mode)
        self._encoder_factors.eval()
        return self

    def batch(self, rows: Sequence[Row], load: LoadMedium) -> Batch:
        """Rows packed the way that is quickest on the trainee's device, and brought there."""
        looks_ahead = any(span.looks_ahead for row in rows for span in row.spans)
        return collate(rows, load, tight=not looks_ahead and self._computes_tightly).to(self.device)

    def forward(self, batch: Batch, made: Made | None = None, routed: list[Tensor] | None = None) -> Tensor:
        """Logits [L, V] of the tokens that are to be predicted.

        Args:
            made: what `make` gave for the batch's media, or something in its place.
            routed: gets what the routers of a mixture of experts say: see routing.
        """
        return self._logits(self.embed(batch, made), batch, routed)

    def _logits(self, embeddings: Tensor, batch: Batch, routed: list[Tensor] | None) -> Tensor:
        asked = {} if routed is None else {"output_router_logits": True}
        places = batch.places[:, None] if batch.places is not None else None
        with packed(batch.layout, self._layers), self.at(places):
            output = self.decoder(
                inputs_embeds=embeddings,
                position_ids=batch.layout.positions(self.device),
                use_cache=False,
                logits_to_keep=batch.predicting,
                **asked,
            )
        if routed is not None:
            routed += output.router_logits
        logits: Tensor = output.logits[0]
        return logits

    def loss(
        self,
        batch: Batch,
        made: Made | None = None,
        routed: list[Tensor] | None = None,
        smoothing: float = 0.0,
    ) -> Tensor:
        """objective.answer_loss of forward's logits, which are not all made at once where that can be had."""
        embeddings = self.embed(batch, made)
        if isinstance(batch.layout, Tight) and routed is None and self.training and torch.is_grad_enabled():
            graphs = self._graphs_of_steps()
            if graphs is not None:
                try:
                    return graphs.loss(embeddings, batch, smoothing)
                except RuntimeError as error:
                    log.warning("steps are computed without CUDA graphs: %s", error)
                    self._graphs = None
        return self._loss(embeddings, batch, smoothing, routed)

    def _loss(
        self, embeddings: Tensor, batch: Batch, smoothing: float, routed: list[Tensor] | None = None
    ) -> Tensor:
        head = self._head_apart()
        if head is None:
            return answer_loss(self._logits(embeddings, batch, routed), batch.labels, smoothing)
        with _one_row(head) as given:
            self._logits(embeddings, batch, routed)
        rows = rows_of_logits(self.base_decoder.config.get_text_config().vocab_size, self.device.type)
        return parted_loss(given[0][0], batch.labels, head, rows, smoothing)

    def _graphs_of_steps(self) -> Graphs | None:
        if not self._has_looked_for_graphs:
            self._has_looked_for_graphs = True
            # what is computed anew puts the random state back, which no recording allows
            if not self.recomputes:
                self._head_apart()  # which tries something out, once
                self._graphs = Graphs(self.decoder, self._loss)
        return self._graphs

    @cached_property
    def _computes_tightly(self) -> bool:
        """Whether torch's kernels for rows of any lengths give what padded rows give."""
        embedding: Any = self.embedding()
        if self.device.type != "cuda" or embedding.weight.dtype == torch.float32:
            return False
        rows = [_text_row(length) for length in (11, 7)]
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                padded, tight = (
                    self(collate(rows, _no_medium, tight=each).to(self.device)) for each in (False, True)
                )
            return relative_error(tight[: len(padded)], padded) <= PARITY_BOUNDS[torch.bfloat16]
        except (ImportError, RuntimeError, UnsupportedError) as error:
            log.warning("batches are padded: %s", error)
            return False
        finally:
            self.train(training)

    def _head_apart(self) -> nn.Module | None:
        """The decoder's last layer, where it is frozen and what it gives are the logits; else None."""
        head = self.base_decoder.get_output_embeddings()
        if not isinstance(head, nn.Module) or any(each.requires_grad for each in head.parameters()):
            return None
        if self._ends_in_head is None:
            self._ends_in_head = self._gives_logits(head)
        return head if self._ends_in_head else None

    @torch.no_grad()
    def _gives_logits(self, head: nn.Module) -> bool:
        """Whether nothing is done to logits after the last layer, as a cap would be."""
        training = self.training
        self.eval()  # no dropout, which would draw from the run's numbers
        try:
            with _one_row(head) as given:
                logits = self(collate([_text_row(3)], _no_medium).to(self.device))
            return len(given) == 1 and given[0].dim() == 3 and torch.equal(head(given[0][:, :1])[0], logits)
        finally:
            self.train(training)

    def at(self, places: Tensor | None, shift: Tensor | None = None) -> AbstractContextManager[None]:
        """Within, the decoder's positions are those in three dimensions, if it has any: modalities.rope."""
        return self._rope.at(places, shift) if self._rope is not None else nullcontext()

    def embed(self, batch: Batch, made: Made | None = None) -> Tensor:
        """[1, T, D]: the tokens' embeddings, with media in their spans."""
        embeddings: Tensor = self.embedding()(batch.tokens)[None]
        self.place(embeddings, batch.spans, self.make(batch.media) if made is None else made)
        return embeddings

    def make(self, media: Mapping[str, Sequence[Tensor]]) -> Made:
        """[M, D] of each medium, by modality, in order."""
        return {name: self.vectors(name, inputs) for name, inputs in media.items()}

    def place(self, embeddings: Tensor, spans: Sequence[Span], made: Made) -> None:
        """Put media, by modality in the order of their first spans, into embeddings [1, T, D]."""
        coming = {name: iter(vectors) for name, vectors in made.items()}
        current: dict[str, Tensor] = {}
        filling = []
        for span in spans:
            if span.offset == 0:
                current[span.modality] = next(coming[span.modality])
            filling.append(current[span.modality])
        place(embeddings, 0, spans, filling)

    def vectors(self, modality: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """[M, D] of each medium: of its pooled features, or, where the encoder learns, of what its `prepare`
        gives."""
        head = self.head(modality)
        if modality in self.encoders:
            features = self.encoders[modality].encoder.features(inputs)
            inputs = [pool(each.float(), head.spec) for each in features]
        inputs = [each.to(self.device) for each in inputs]
        if len({each.shape[1:] for each in inputs}) > 1:  # an identity head's, which computes nothing
            return [head(each).flatten(0, 1) for each in inputs]
        parts: Sequence[Tensor] = head(torch.cat(inputs)).split([len(each) for each in inputs])
        return [part.flatten(0, 1) for part in parts]

    def head(self, modality: str) -> ProjectionHead:
        head = self.heads[modality]
        assert isinstance(head, ProjectionHead)
        return head

    def embedding(self) -> nn.Module:
        """The decoder's token embeddings."""
        module: nn.Module = self.decoder.get_input_embeddings()
        return module

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.decoder.named_parameters():
            if parameter.requires_grad:
                yield f"decoder.{name}", parameter

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for modality in sorted(self.trained_heads):
            for name, parameter in self.head(modality).named_parameters():
                yield f"heads.{modality}.{name}", parameter

    def encoder_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for modality, adapted in sorted(self.encoders.items()):
            for name, parameter in adapted.peft.named_parameters():
                if parameter.requires_grad:
                    yield f"encoders.{modality}.{name}", parameter

    def space_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.space is not None:
            for name, parameter in self.space.named_parameters():
                yield f"space.{name}", parameter

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by name, in a fixed order."""
        learned = (self.lora_parameters, self.head_parameters, self.encoder_parameters, self.space_parameters)
        return dict(pair for parameters in learned for pair in parameters())


def _text_row(length: int) -> Row:
    """The first words of a vocabulary, all but the first of them learned."""
    return Row(1, np.arange(length, dtype=np.int32), np.arange(length) > 0, (), ())


def _no_medium(modality: str, digest: str) -> Tensor:
    raise AssertionError("these rows hold no media")


@contextmanager
def _one_row(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within, the layer computes its first row alone, and what it was given [1, L, D] is kept."""
    given: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        given.append(inputs[0])
        return (inputs[0][:, :1],)

    with head.register_forward_pre_hook(keep):
        yield given
