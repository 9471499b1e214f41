"""What a pod calls before and after its agent where the run directory is a URL: to get its copy, and to send the rest.

    python -m dtrain.cluster.kubernetes.podcopy fetch|push URL JOB_ID

`fetch` prints where the copy is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dtrain.cluster import exits
from dtrain.cluster.errors import StorageError, UsageError
from dtrain.cluster.mirror import mirror_of, patiently
from dtrain.cluster.rundir import RunDir

_PATIENCE_S = {"fetch": 60.0, "push": 15.0}


def main(argv: Sequence[str]) -> int:
    what, url, job_id = argv
    run = RunDir(url)
    try:
        patiently(lambda: _copy(run, job_id, push=what == "push"), _PATIENCE_S[what])
    except UsageError as error:
        print(f"run_dir: {error}", file=sys.stderr)
        return exits.NEVER_RETRY
    except StorageError as error:
        print(f"run_dir: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL  # for the Job to try another pod
    if what == "fetch":
        print(run.path)
    return exits.DONE


def _copy(run: RunDir, job_id: str, *, push: bool) -> None:
    mirror = mirror_of(run.path)
    assert mirror is not None
    mirror.job_id = job_id
    if push:
        mirror.push()
    mirror.refresh()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
