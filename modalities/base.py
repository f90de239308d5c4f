"""A base: one frozen decoder, encoders by modality, default projection heads, described by base.toml.

    <name>/base.toml
    <name>/decoder/                     a Hugging Face directory: weights, tokenizer, chat template
    <name>/encoders/<modality>/         its kind's: an open_clip local directory, or one of transformers
    <name>/projectors/<modality>.safetensors
    <name>/embedding.safetensors        if it was trained: the space of texts and media

Paths in base.toml are relative to it, or absolute where the decoder lies elsewhere. Every component has
its own digest, and an adapter binds to those that it relies on. Nothing is loaded by reading a base; see
load_decoder, load_tokenizer, load_head and modalities.encoders.load_encoder.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okavango.modalities.projector import HeadSpec, ProjectionHead, bind_head
from okavango.platform.bundle import digest_of, file_sha256, folder_sha256
from okavango.platform.errors import ConfigError, IntegrityError, NotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1
BASE_FILE = "base.toml"
_KEYS = ("format", "name", "recipe", "decoder", "encoders", "projectors", "embedding")
_DECODER_KEYS = ("path", "digest", "context")
_ENCODER_OPTIONS = ("kind", "tiles", "mark", "looks_ahead")
_ENCODER_KEYS = ("path", "digest", "image_size", "layers", "width", "grid", *_ENCODER_OPTIONS)
_SPEC_KEYS = tuple(field.name for field in fields(HeadSpec))
_HEAD_KEYS = ("path", "digest", "trained", *_SPEC_KEYS)
_EMBEDDING_KEYS = ("path", "digest")


@dataclass(frozen=True)
class DecoderSpec:
    """`context`: the most tokens that a sequence may have."""

    path: Path
    digest: str
    context: int


@dataclass(frozen=True)
class EncoderSpec:
    """What turns media of one modality into features; modalities/encoders.py knows the kinds.

    Attributes:
        width: C, channels of a feature: of all `layers` together.
        grid: rows and columns of the feature map at `image_size` pixels; for sounds, 1 and the most positions
            of one window.
        digest: over the directory, preprocessing included, and all that is said here.
        layers: blocks whose features are joined, counted from the end: -1 is the last.
        kind: what the directory holds: "open_clip", "whisper", "transformers", or a plugin's.
        tiles: most pieces that a large picture is cut into, each seen at `image_size`, beside the whole.
        image_size: 0 for sounds, and for encoders whose own preprocessing decides.
        mark: what the decoder's chat template writes for a medium, where it takes messages as parts.
        looks_ahead: whether the decoder lets a medium's positions see each other, later ones too.
    """

    path: Path
    digest: str
    image_size: int
    width: int
    grid: tuple[int, int]
    layers: tuple[int, ...] = (-1,)
    kind: str = "open_clip"
    tiles: int = 1
    mark: str | None = None
    looks_ahead: bool = False


@dataclass(frozen=True)
class DefaultHead:
    """`trained` is False for a head that was only initialised: the bare base cannot see or hear then."""

    path: Path
    digest: str
    spec: HeadSpec
    trained: bool


@dataclass(frozen=True)
class DefaultEmbedding:
    """The space that texts and media share, beside default heads that were trained jointly with it."""

    path: Path
    digest: str


@dataclass(frozen=True)
class Base:
    """What base.toml says; see the module's docstring.

    Attributes:
        embedding: None where no joint objective trained one: modalities.embedding reads it.
        recipe: what made it, where that is more than its parts: another recipe of that name makes it anew.
    """

    name: str
    folder: Path
    decoder: DecoderSpec
    encoders: dict[str, EncoderSpec]
    heads: dict[str, DefaultHead]
    recipe: str | None = None
    embedding: DefaultEmbedding | None = None

    @cached_property
    def components(self) -> dict[str, str]:
        """Digests by component: decoder, encoders.image, projectors.image."""
        return {
            "decoder": self.decoder.digest,
            **{f"encoders.{name}": encoder.digest for name, encoder in self.encoders.items()},
            **{f"projectors.{name}": head.digest for name, head in self.heads.items()},
            **({"embedding": self.embedding.digest} if self.embedding else {}),
        }

    @property
    def width(self) -> int | None:
        """D, what heads give and the decoder takes; None for a base without heads."""
        return next((head.spec.out_width for head in self.heads.values()), None)

    @property
    def digest(self) -> str:
        return digest_of(self.components)


def read_base(folder: Path) -> Base:
    """Read <folder>/base.toml.

    Raises:
        NotFoundError: no base lies there.
        ConfigError: base.toml is not of this format.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        raise NotFoundError(
            "no base lies here", where=str(folder), remedy="okavango base list shows the bases"
        )
    try:
        return _base(folder, tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"not a base description: {error!r}", where=str(path)) from error


def find_base(name: str, bases: Path) -> Base:
    """The base of that name below `bases`, or the base that lies at that path.

    Raises:
        NotFoundError: there is none; names those that there are.
    """
    folder = bases / name
    if (folder / BASE_FILE).is_file():
        return read_base(folder)
    if (Path(name) / BASE_FILE).is_file():
        return read_base(Path(name).absolute())
    known = ", ".join(list_bases(bases)) or "none"
    raise NotFoundError(
        f"no base is called {name!r}; known: {known}",
        remedy=f"okavango base build {name}" if name == "starter" else "okavango base add makes one",
    )


def list_bases(bases: Path) -> tuple[str, ...]:
    """Names of the finished bases; a hidden folder is one that is being built."""
    names = (path.parent.name for path in bases.glob(f"*/{BASE_FILE}"))
    return tuple(sorted(name for name in names if not name.startswith(".")))


def verify_base(base: Base) -> None:
    """Recompute every component's digest.

    Raises:
        IntegrityError: a component is not what base.toml says.
    """
    found = {"decoder": tree_digest(base.decoder.path)}
    for name, encoder in base.encoders.items():
        found[f"encoders.{name}"] = encoder_digest(
            encoder.path, encoder.image_size, encoder.layers, encoder.kind, encoder.tiles
        )
    found |= {f"projectors.{name}": head_digest(head.path, head.spec) for name, head in base.heads.items()}
    if base.embedding is not None:
        found["embedding"] = embedding_digest(base.embedding.path)
    for component, digest in found.items():
        if digest != base.components[component]:
            raise IntegrityError(
                "differs from the digest in base.toml",
                where=f"{base.folder}: {component}",
                remedy="build the base again",
            )


def tree_digest(folder: Path) -> str:
    return digest_of(folder_sha256(folder))


def encoder_digest(
    folder: Path, image_size: int, layers: tuple[int, ...], kind: str = "open_clip", tiles: int = 1
) -> str:
    """Over all that decides what an encoder makes of a medium."""
    described = {"files": folder_sha256(folder), "image_size": image_size, "layers": list(layers)}
    if (kind, tiles) != ("open_clip", 1):  # which adapters bind to as it was before there was more
        described |= {"kind": kind, "tiles": tiles}
    return digest_of(described)


def head_digest(path: Path, spec: HeadSpec) -> str:
    return digest_of({"weights": file_sha256(path), "spec": spec.to_json()})


def embedding_digest(path: Path) -> str:
    """Over the weights, and the description beside them."""
    files = {file.name: file_sha256(file) for file in (path, path.with_suffix(".json"))}
    return digest_of(files)


def load_decoder(
    base: Base,
    dtype: torch.dtype,
    device: str = "cpu",
    attention: str = "sdpa",
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The frozen decoder as transformers' own model class, in eval mode.

    Raises:
        IntegrityError: its weights are torn.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from okavango.modalities.rope import install_rope

    # bitsandbytes packs weights as they come to their device; others are mapped first and moved then
    packed = {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}
    with _readable(base.decoder.path):
        model = AutoModelForCausalLM.from_pretrained(
            base.decoder.path, dtype=dtype, attn_implementation=attention, local_files_only=True, **packed
        )
    install_rope(model)
    if quantization is None:
        model.to(torch.device(device))  # type: ignore[arg-type]  # the decorated stub has lost self
    return model.eval().requires_grad_(False)


def empty_decoder(base: Base) -> PreTrainedModel:
    """The decoder's modules without its weights (on torch's meta device), to look at names and shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.decoder.path, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The decoder's tokenizer.

    Raises:
        ConfigError: it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.decoder.path, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError("the decoder's tokenizer has no chat template", where=str(base.decoder.path))
    return tokenizer


def load_head(head: DefaultHead) -> ProjectionHead:
    """A default head.

    Raises:
        IntegrityError: its file is missing, torn, or not of the shape that base.toml says.
    """
    from safetensors.torch import load_file

    with _readable(head.path):
        tensors = load_file(head.path)
    return bind_head(head.spec, tensors, where=head.path.name)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, FileNotFoundError) as error:
        raise IntegrityError(
            f"the weights cannot be read: {error}", where=str(path), remedy="build the base again"
        ) from error


def _base(folder: Path, raw: dict[str, Any]) -> Base:
    if raw["format"] != FORMAT:
        raise ConfigError(f"format {raw['format']}, expected {FORMAT}", where=str(folder / BASE_FILE))
    _check_keys(folder / BASE_FILE, raw)
    decoder = raw["decoder"]
    return Base(
        name=raw["name"],
        folder=folder,
        decoder=DecoderSpec(folder / decoder["path"], decoder["digest"], decoder["context"]),
        encoders={name: _encoder(folder, item) for name, item in raw.get("encoders", {}).items()},
        heads={name: _head(folder, item) for name, item in raw.get("projectors", {}).items()},
        recipe=raw.get("recipe"),
        embedding=_embedding(folder, raw["embedding"]) if "embedding" in raw else None,
    )


def _check_keys(path: Path, raw: dict[str, Any]) -> None:
    """Raises ConfigError for the first key that nobody would read."""
    tables: dict[str, tuple[dict[str, Any], tuple[str, ...]]]
    tables = {"": (raw, _KEYS), "decoder.": (raw["decoder"], _DECODER_KEYS)}
    for kind, known in (("encoders", _ENCODER_KEYS), ("projectors", _HEAD_KEYS)):
        tables |= {f"{kind}.{name}.": (item, known) for name, item in raw.get(kind, {}).items()}
    if "embedding" in raw:
        tables["embedding."] = (raw["embedding"], _EMBEDDING_KEYS)
    for place, (table, names) in tables.items():
        for key in table.keys() - set(names):
            close = difflib.get_close_matches(key, names, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"
            raise ConfigError(f"unknown key {place}{key}", where=str(path), remedy=remedy)


def _encoder(folder: Path, raw: dict[str, Any]) -> EncoderSpec:
    rows, columns = raw["grid"]
    return EncoderSpec(
        folder / raw["path"],
        raw["digest"],
        raw["image_size"],
        raw["width"],
        (rows, columns),
        tuple(raw["layers"]),
        **{name: raw[name] for name in _ENCODER_OPTIONS if name in raw},
    )


def _embedding(folder: Path, raw: dict[str, Any]) -> DefaultEmbedding:
    return DefaultEmbedding(folder / raw["path"], raw["digest"])


def _head(folder: Path, raw: dict[str, Any]) -> DefaultHead:
    spec = HeadSpec(**{name: raw[name] for name in _SPEC_KEYS if name in raw})
    return DefaultHead(folder / raw["path"], raw["digest"], spec, raw["trained"])
