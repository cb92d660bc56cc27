"""Jobs that are killed end as if they had not been. SCORESDE_EXT_NIGHTLY=1 kills ten times as often."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NIGHTLY = os.environ.get("SCORESDE_EXT_NIGHTLY", "0") != "0"


def kills(folder: Path, *arguments: object) -> dict[str, Any]:
    program = Path(__file__).with_name("job_kills.py")
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(3600 if NIGHTLY else 600)
def test_kills(tmp_path: Path) -> None:
    """At random moments by SIGKILL, and at the syncs and renames one by one, with the last bytes torn off; with fixed
    steps and refilled slots, in every kind of file."""
    found = kills(tmp_path, "--kills", 250 if NIGHTLY else 25, "--every", 1 if NIGHTLY else 12)
    faults = {name: n for name, n in found.items() if name.startswith("faults_")}
    assert found["random_kills"] >= (250 if NIGHTLY else 25)
    assert len(faults) == 4 and min(faults.values()) >= 5
    assert found["random_kills"] + sum(faults.values()) >= 50


@pytest.mark.timeout(3600 if NIGHTLY else 600)
def test_workers_are_killed(tmp_path: Path) -> None:
    """Of 2 and of 4, one: the others make its shards. Where it was the first, the same command continues."""
    rounds = 20 if NIGHTLY else 2
    found = kills(tmp_path, "--teams", rounds)
    assert found["teams_of_2"] == found["teams_of_4"] == rounds
    assert found["taken_over_2"] + found["taken_over_4"] >= 1
