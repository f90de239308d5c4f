"""How a job's process takes its place among others."""

import subprocess
import sys
from pathlib import Path

import pytest

GROUP = Path("/proc/self/autogroup")


def _told(program: str) -> str:
    command = [sys.executable, "-c", f"import os\nfrom okavango.training.process import give_way\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_job_gives_way_to_other_processes() -> None:
    assert _told("before = os.nice(0); give_way(7); print(os.nice(0) - before)") == "7"


@pytest.mark.skipif(not GROUP.is_file(), reason="this system does not group processes by session")
def test_a_job_gives_way_to_other_sessions() -> None:
    read = f"print(open({str(GROUP)!r}).read().split()[-1])"
    assert _told(f"give_way(19); {read}") == "19"
    assert _told(f"give_way(0); {read}") == "0"
