"""100 random schedules of the ray back end: launches that are killed at their calls, and others after them. No job is
without its run, none is there twice, and a cancel ends them all. They go to a stand-in for the Jobs API
(assets/rayjobs.py), for a job's start costs Ray a second of a core; some go to a real one in test_ray.py.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import rayschedules
from rayjobs import ray_jobs

SCHEDULES = int(os.environ.get("DTRAIN_RAY_SCHEDULES", "100"))
SEED = int(os.environ.get("DTRAIN_RAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_no_schedule_loses_or_doubles_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nseed {SEED} (DTRAIN_RAY_SEED repeats it, DTRAIN_RAY_SCHEDULES={SCHEDULES})")
    with ray_jobs() as jobs:
        wrong = rayschedules.play_all(jobs.url, jobs.jobs, tmp_path, seed=SEED, number=SCHEDULES)
    assert not wrong, "\n".join(wrong)
