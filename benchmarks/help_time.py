"""How long `dtrain --help` takes as a whole process, in turn with an empty Python program.

python benchmarks/help_time.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

DTRAIN = Path(sys.executable).parent / "dtrain"


def seconds(command: list[str | Path]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    pairs = [(seconds([DTRAIN, "--help"]), seconds([sys.executable, "-c", ""])) for _ in range(rounds + 1)][1:]
    ours, empty = ([pair[side] for pair in pairs] for side in (0, 1))
    print(f"dtrain --help: median {statistics.median(ours):.3f} s, worst {max(ours):.3f} s (limit 0.3 s)")
    print(f"empty program: median {statistics.median(empty):.3f} s, worst {max(empty):.3f} s")


if __name__ == "__main__":
    main()
