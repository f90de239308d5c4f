"""Altered views of a picture, so that a head learns what is drawn and not how.

View 0 is the picture itself. The others move, turn, stretch, recolour or blur it, each decided by the
picture's digest and the view's number alone, so that features of views can be kept like those of pictures.
Hues change little, since answers speak of colours, and nothing is mirrored: an arrow to the left is no
arrow to the right.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.transforms import v2

VERSION = 1  # part of the features' key: count up when views of the same number come to look different
_WHITE = (255, 255, 255)


def view(picture: Image.Image, digest: str, number: int, side: int) -> Image.Image:
    """View `number` of an RGB picture.

    Args:
        digest: the picture's, in hex.
        side: pixels that an encoder sees; other views than 0 are drawn at this size, or at their own for 0.
    """
    if number == 0:
        return picture
    scale = side / max(picture.size) if side else 1.0
    width, height = (max(1, round(length * scale)) for length in picture.size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(digest[:15], 16) + number)
        return _transform()(picture.resize((width, height)))


@cache
def _transform() -> v2.Compose:
    from torchvision.transforms import InterpolationMode, v2

    affine = v2.RandomAffine(
        degrees=20,
        translate=(0.1, 0.1),
        scale=(0.65, 1.1),
        shear=8,
        interpolation=InterpolationMode.BILINEAR,
        fill=_WHITE,
    )
    colours = v2.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.6, hue=0.05)
    blur = v2.RandomApply([v2.GaussianBlur(7, sigma=(0.5, 2.0))], p=0.2)
    return v2.Compose([affine, colours, v2.RandomGrayscale(0.15), blur])
