"""QLoRA: a frozen decoder in four bits while adapters learn on it (Dettmers et al. 2023), by bitsandbytes.

Its linear layers are packed as NF4, 4.5 bits a weight with the scales of each 64, and unpacked for each
product; the embedding and the output layer stay as they are. What is published is plain LoRA, and its probes
are computed on the decoder as it is served, so a bundle neither knows nor needs any of this.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from okavango.platform.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

BITS = 4 + 32 / 64
"""Of a packed weight, with its share of a scale."""


def check_library() -> None:
    """Raises UnsupportedError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError(
            "bitsandbytes is not installed", where="quantization", remedy="pip install 'okavango[qlora]'"
        )


def packing_of(name: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers is to pack weights; None leaves them as they are. `dtype`: of the products."""
    if name is None:
        return None
    from transformers import BitsAndBytesConfig

    check_library()
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_compute_dtype=dtype)
