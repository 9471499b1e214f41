"""What a pod calls before and after its agent where the run directory is a URL: to get its copy, and to send the rest.

    python -m dtrain.cluster.kubernetes.podcopy fetch|push URL JOB_ID

`fetch` prints where the copy is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dtrain.cluster import exits
from dtrain.cluster.errors import StorageError, UsageError
from dtrain.cluster.mirror import mirror_of
from dtrain.cluster.rundir import RunDir

_AGAIN = 75  # for the Job to try another pod: EX_TEMPFAIL of sysexits(3)
_PATIENCE_S = {"fetch": 60.0, "push": 15.0}


def main(argv: Sequence[str]) -> int:
    what, url, job_id = argv
    run = RunDir(url)
    deadline = time.monotonic() + _PATIENCE_S[what]
    while True:
        try:
            mirror = mirror_of(run.path)
            assert mirror is not None
            mirror.job_id = job_id
            if what == "push":
                mirror.push()
            mirror.refresh()
        except UsageError as error:
            print(f"run_dir: {error}", file=sys.stderr)
            return exits.NEVER_RETRY
        except StorageError as error:
            if time.monotonic() > deadline:
                print(f"run_dir: {error}", file=sys.stderr)
                return _AGAIN
            time.sleep(1.0)
        else:
            if what == "fetch":
                print(run.path)
            return exits.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
