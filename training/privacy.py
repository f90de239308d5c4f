"""Differential privacy of a job: what it spends, and where its chance comes from.

DP-SGD (Abadi et al. 2016): each row is in a step with the same small probability, its gradient is cut to a
norm, and noise of a multiple of that norm is added to their sum. Opacus' accountant says what ε comes of it,
by Rényi differential privacy (Mironov 2017; Mironov, Talwar and Zhang 2019). Neighbours are data sets that
differ by one row, there or not; the number of rows counts as public.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from okavango.platform.errors import ConfigError, UnsupportedError
from okavango.training.spec import TrainSpec

History = Sequence[tuple[float, float, int]]
"""(noise multiplier, sampling rate, steps with both), as Opacus' accountants have it."""

# Opacus' orders end at 63, which is too few for small ε.
_ORDERS = (
    [1 + i / 10 for i in range(1, 100)] + [float(i) for i in range(11, 64)] + [80.0, 128.0, 256.0, 512.0]
)


@dataclass(frozen=True)
class Budget:
    """What each step of a private run does.

    Attributes:
        noise_multiplier: standard deviation of the noise, in units of max_grad_norm.
        sample_rate: probability with which a row is in a step.
        max_grad_norm: to which a row's gradient is cut, over everything that learns.
    """

    noise_multiplier: float
    sample_rate: float
    max_grad_norm: float
    delta: float

    def epsilon(self, steps: int) -> float:
        """Spent after so many steps, at `delta`."""
        return epsilon_of([(self.noise_multiplier, self.sample_rate, steps)], self.delta)

    def to_json(self, steps: int) -> dict[str, Any]:
        """For a bundle's lineage, after so many steps."""
        return {
            **asdict(self),
            "epsilon": self.epsilon(steps),
            "steps": steps,
            "unit": "row",
            "neighbours": "a row more or less; the number of rows is public",
            "accountant": "Opacus' RDP",
        }


def budget_of(spec: TrainSpec, rows: int) -> Budget | None:
    """What a job over so many rows spends; None for one that is not private.

    Raises:
        ConfigError: fewer rows than a step takes, or a δ that as good as promises nothing.
    """
    privacy = spec.privacy
    if privacy is None:
        return None
    a_step = spec.batch_size * spec.accumulation
    if a_step > rows:
        raise ConfigError(f"a step takes {a_step} of {rows} rows", where="batch_size", remedy="lower it")
    if privacy.delta * rows >= 1:
        raise ConfigError(
            f"{privacy.delta} would allow one of the {rows} rows to be published",
            where="privacy.delta",
            remedy=f"choose one well below {1 / rows:.1g}",
        )
    rate = a_step / rows
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None
        noise = _noise_for(privacy.epsilon, privacy.delta, rate, spec.total_steps(-(-rows // a_step)))
    return Budget(noise, rate, privacy.max_grad_norm, privacy.delta)


def check_accountant() -> None:
    """Raises UnsupportedError where Opacus is not installed."""
    if find_spec("opacus") is None:
        raise UnsupportedError(
            "no accountant is installed", where="privacy", remedy="pip install 'okavango[privacy]'"
        )


def epsilon_of(history: History, delta: float) -> float:
    """ε at δ of all these steps together."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    with _quiet():
        return float(accountant.get_epsilon(delta, alphas=_ORDERS))


def _noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            noise = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=steps,
                epsilon_tolerance=min(0.01, epsilon / 100),
                alphas=_ORDERS,
            )
    except ValueError as error:
        raise ConfigError(
            f"no noise is enough for an ε of {epsilon}", where="privacy.epsilon", remedy="choose a larger one"
        ) from error
    return float(noise)


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice on orders: the bound holds with any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        yield


class Chance:
    """All that is drawn in a private run, from a secret: noise, rows and what is random about each of them.

    Who knew the specification's seed could take the noise off again, so that it plays no part here. Each
    row draws from a stream of its own: were they all to draw from one, a row would change what others do,
    and its influence would have no bound. For the same secret and step, the same is drawn.
    """

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def seed(self, *purpose: str | int) -> int:
        """63 bits for one purpose."""
        return self._bits(*purpose) >> 193

    def rows(self, step: int, count: int, rate: float) -> list[int]:
        """Numbers of the rows in a step, each there by itself with the same probability."""
        drawn = _stream(self._bits("rows", step)).random(count) < rate
        return [int(i) for i in drawn.nonzero()[0]]

    def noise(self, step: int) -> np.random.Generator:
        """Where a step's noise comes from."""
        return _stream(self._bits("noise", step))

    def _bits(self, *purpose: str | int) -> int:
        name = "/".join([self.secret, *map(str, purpose)])
        return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")


def _stream(bits: int) -> np.random.Generator:
    """numpy's, from 128 bits of these: torch's on CPUs keeps 32 of its seed, so that all the noise that a
    step could have had can be gone through."""
    return np.random.Generator(np.random.PCG64DXSM(bits))
