import pytest
import torch

from okavango.modalities.precision import check_device
from okavango.platform.errors import ConfigError


def test_the_processor_is_always_there() -> None:
    check_device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_a_device_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one of cpu, cuda"):
        check_device(name)


def test_a_graphics_processor_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        check_device(f"cuda:{torch.cuda.device_count()}")
    assert caught.value.where == f"device cuda:{torch.cuda.device_count()}"
