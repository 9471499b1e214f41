"""A rank of the conformance suite's runs: writes down what reached it, waits until it may go on, ends as it is told.

CELL: a folder. CELL_DO: nothing, or `exit N`. A stop takes it CELL_SAVE_S, and ends it with 85.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

folder = Path(os.environ["CELL"])
rank = os.environ["RANK"]


def reach_master() -> str:
    """The address by which this rank reached it."""
    for _ in range(300):
        try:
            with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 5) as found:
                return str(found.getsockname()[0])
        except OSError:
            time.sleep(0.1)
    raise SystemExit("MASTER_ADDR is not reached")


def stop(number: int, frame: object) -> None:
    (folder / f"saving-{rank}").touch()
    time.sleep(float(os.environ.get("CELL_SAVE_S", "0")))
    sys.exit(85)


signal.signal(signal.SIGTERM, stop)
seen = {
    "environ": dict(os.environ), "argv": sys.argv[1:], "host": socket.gethostname(), "reached": reach_master(),
    "pid": os.getpid(), "parent": os.getppid(),
}  # fmt: skip
print(f"out of {rank}", flush=True)
print(f"err of {rank}", file=sys.stderr, flush=True)
number = len(list(folder.glob(f"seen-{rank}-*.json"))) + 1
(folder / f".seen-{rank}").write_text(json.dumps(seen))
(folder / f".seen-{rank}").rename(folder / f"seen-{rank}-{number}.json")
if os.environ.get("CELL_DO", "").startswith("exit "):
    while len(list(folder.glob(f"seen-*-{number}.json"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)  # one that leaves while others start would be another failure
    sys.exit(int(os.environ["CELL_DO"].split()[1]))
while not (folder / "go").exists():
    time.sleep(0.05)
