"""What a node looks at before it takes part, and its last word where it can't: one message, and the job ends with 93.

What can be wrong before Python runs is cluster/nodescript.py's.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping

from dtrain.cluster.errors import NodeError, UsageError
from dtrain.cluster.jobplan import JobPlan
from dtrain.cluster.rundir import RunDir, append_event, write_once
from dtrain.cluster.secretrefs import parse_secrets, secret_values
from dtrain.cluster.version import VERSION
from dtrain.runtime.options import Options


def refuse_other_version(plan: JobPlan) -> None:
    """Raises NodeError: the two sides share files and messages whose form may have changed between them."""
    if plan.version != VERSION:
        raise NodeError(
            f"cluster.python: {plan.python} has dtrain {VERSION}, but the job was submitted with {plan.version}. "
            f"Install {plan.version} there, or submit with {VERSION}."
        )


def refuse_missing_secrets(plan: JobPlan, environ: Mapping[str, str]) -> None:
    """Raises NodeError: without them training would go on until somebody asks for one."""
    try:
        values = secret_values(plan.secrets, environ)
    except UsageError as error:
        raise NodeError(f"cluster.secrets: {error}") from error
    if missing := [secret.name for secret in parse_secrets(plan.secrets) if secret.name not in values]:
        raise NodeError(
            f"cluster.secrets: {missing[0]} is not set. Export it in the shell that submits the job, which has to hand "
            f"its variables on, or have it read from a file: {missing[0]}=file:PATH"
        )


def give_up(options: Options, reason: str) -> int:
    """Ends the job, unless it has ended already; the node's exit code."""
    run = RunDir(options.run_dir)
    code = NodeError.exit_code
    said = f"node {options.node_rank} ({socket.gethostname()}): {reason}"
    words = {"state": "failed", "exit_code": code, "reason": said}
    ended = run.control(options.job_id).ended
    if write_once(ended, json.dumps({**words, "at": round(time.time(), 3)}), 0o600):
        append_event(run, "ended", **words, step=0)
    return code
