"""The exit codes that scripts and schedulers may rely on."""

from __future__ import annotations

DONE = 0
FAILED = 1
USAGE = 2
CANCELLED = 3
UNKNOWN = 4
STOPPED = 85  # stopped on request with its state saved: start me again
NEVER_RETRY = 93  # the same failure would come again
DETACHED = 130
