"""Figures of a GPU, and what is made of them."""

from __future__ import annotations

import pytest
from gpu_report import markdown, tera

STEPS = {"median": 0.008, "mean": 0.0081, "highest": 0.02, "graph": 0.0075}
FOUND = {
    "machine": {
        "machine": "a processor",
        "cpus": 16,
        "load": 1.0,
        "python": "3.12",
        "versions": {"torch": "2.11"},
    },
    "gpu": "a GPU",
    "ceilings": {"copy": 3e12, "products": 8e14, "from_host": 5.5e10},
    "checked": "14 passed",
    "shapes": {
        "8B": {
            "context": 512,
            "rank": 16,
            "adapters": 64,
            "parameters": 8_000_000_000,
            "layers": 32,
            "width": 4096,
            "steps": {
                "32": {
                    "base": STEPS,
                    "own": {**STEPS, "median": 0.01, "graph": None},
                    "floor": {"base": 0.006, "own": 0.007},
                }
            },
            "prefill": [{"count": 8, "length": 512, "base": 0.1, "adapters": 0.11}],
            "swap": {"base": 0.02, "held": 0.022, "file": 0.5, "copy": 0.00155},
        }
    },
    "peers": {
        "8B": {
            "continuous": {"32": {"seconds": 0.0096, "settings": "sdpa, graphs"}, "64": None},
            "peft": {"adapters": 32, "seconds": 2.0},
        }
    },
}


def test_figures_stand_beside_their_limits_and_peers() -> None:
    shown = markdown(FOUND)
    assert "| 32 | 8.00 (7.50) | 75% | 10.00 (–) | 70% | 1.25 |" in shown
    assert "| 32 | 9.60 | 1.20 | sdpa, graphs |" in shown
    assert "2000 ms a step, 200 × ours" in shown
    assert "| 8 × 512 | 100.0 | 661 | 110.0 | 1.10 |" in shown
    assert "in 1.55 ms" in shown


def test_a_run_that_was_cut_short_is_shown_as_far_as_it_came() -> None:
    assert "8B" not in markdown({**FOUND, "shapes": {}, "peers": {}})
    assert "PEFT's" not in markdown({**FOUND, "peers": {}})


def test_work_of_prompts() -> None:
    # 2 × 100 × 12 of products, and of each of three prompts 4 × 2 × 10 × 4² / 2
    assert tera(1.0, 100, 2, 10, 3, 4) == pytest.approx((2400 + 3 * 640) / 1e12)
