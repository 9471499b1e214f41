"""Saving to S3: dtrain, the raw upload of the same bytes by the same client, and torch's DCP with s3fs, in turn.

    python benchmarks/checkpoint_s3.py [--rounds N] [--gib N]

2 processes save a state of which each holds half to an endpoint in memory (tests/assets/s3sink.py) that discards large
bodies, so that clients are measured and not a server. Time counts from the call until the checkpoint is committed, on
all ranks: dtrain's Checkpointer with its copy into staging, checksums, indexes and manifest; `obstore.put` of a buffer
a rank; `torch.distributed.checkpoint.save` with an FsspecWriter, as it is by default. The first round warms up.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dtrain.cluster.storage import open_storage
from dtrain.cluster.workerenv import WorkerEnv
from dtrain.runtime.checkpoint.attempts import claim_attempt
from dtrain.runtime.checkpoint.checkpointer import Checkpointer
from dtrain.runtime.ranks import Ranks, process_group
from dtrain.runtime.stores.limits import Limits
from dtrain.strategies.boxes import Box, TensorSpec, sharded

WORLD_SIZE, NUM_TENSORS, COLUMNS = 2, 16, 4096
SINK = Path(__file__).resolve().parent.parent / "tests" / "assets" / "s3sink.py"
SIDES = ("dtrain", "raw upload", "DCP + s3fs")


def dtrain_side(ranks: Ranks, rows: int) -> Callable[[int], None]:
    """A save by dtrain: 16 tensors, sharded over the ranks as fsdp shards them."""
    storage = open_storage("s3://bench/dtrain")
    if ranks.global_rank == 0:
        claim_attempt(storage, host="bench", job_id="bench")
    layout = sharded(2, 0, tuple(range(WORLD_SIZE)))
    shape, local = (rows * WORLD_SIZE, COLUMNS), (rows, COLUMNS)
    names = [f"model.{number}" for number in range(NUM_TENSORS)]
    specs = [TensorSpec(name=name, dtype="F32", shape=shape, layout=layout) for name in names]
    box = Box((ranks.global_rank * rows, 0), local)
    state = {name: [(box, torch.rand(local))] for name in names}
    checkpointer = Checkpointer(
        storage, attempt=1, rank=ranks.global_rank, world_size=WORLD_SIZE, strategy={"name": "fsdp"},
        board=ranks.board, on_commit=lambda done: None, keep=2,
    )  # fmt: skip

    def save(step: int) -> None:
        checkpointer.save(step, specs, state, {"step": step})
        checkpointer.wait()

    return save


def raw_side(ranks: Ranks, rows: int) -> Callable[[int], None]:
    """The same bytes from one buffer, with dtrain's client and part size and nothing else."""
    import obstore
    from obstore.store import S3Store

    limits = Limits()
    store = S3Store("bench", prefix="raw", config={"unsigned_payload": True}, client_options={"allow_http": True})
    data = torch.rand(NUM_TENSORS * rows, COLUMNS).view(torch.uint8).numpy().reshape(-1).data

    def save(step: int) -> None:
        obstore.put(
            store, f"step-{step}/rank-{ranks.global_rank}", data, use_multipart=True,
            chunk_size=limits.part_bytes, max_concurrency=limits.concurrency,
        )  # fmt: skip

    return save


def dcp_side(ranks: Ranks, rows: int) -> Callable[[int], None]:
    """torch's own: DTensors of the same sizes, as FSDP2 has them."""
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    state: dict[str, Tensor] = {
        f"model.{number}": DTensor.from_local(torch.rand(rows, COLUMNS), mesh, [Shard(0)])
        for number in range(NUM_TENSORS)
    }

    def save(step: int) -> None:
        dcp_save(state, storage_writer=FsspecWriter(f"s3://bench/dcp/step-{step}"))

    return save


def rank_main(env: WorkerEnv, rounds: int, rows: int, results: Connection) -> None:
    """One rank; rank 0 sends {side: seconds of each round}."""
    torch.set_num_threads(1)
    with process_group(env) as ranks:
        makers = dict(zip(SIDES, (dtrain_side, raw_side, dcp_side), strict=True))
        sides = {}
        for name, make in makers.items():
            sides[name] = make(ranks, rows)
            dist.barrier()
        seconds: dict[str, list[float]] = {name: [] for name in SIDES}
        for step in range(1, rounds + 2):
            for name, save in sides.items():
                dist.barrier()
                began = time.perf_counter()
                save(step)
                dist.barrier()
                if step > 1:
                    seconds[name].append(time.perf_counter() - began)
            if env.global_rank == 0:
                print(f"round {step - 1}{' (warm-up)' if step == 1 else ''} done", file=sys.stderr, flush=True)
        if env.global_rank == 0:
            results.send(seconds)


@contextlib.contextmanager
def endpoint() -> Iterator[None]:
    """The sink in a process of its own, and AWS_* for it."""
    sink = subprocess.Popen([sys.executable, SINK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert sink.stdout is not None
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{int(sink.stdout.readline())}",
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_REGION="us-east-1",
    )
    try:
        yield
    finally:
        sink.kill()
        sink.communicate()


def measure(rounds: int, rows: int) -> Mapping[str, list[float]]:
    start = multiprocessing.get_context("spawn")
    receive, send = start.Pipe(duplex=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(WORLD_SIZE):
        env = WorkerEnv(
            run_dir="", name="bench", job_id="bench", attempt=1, global_rank=rank, local_rank=rank, node_rank=0,
            world_size=WORLD_SIZE, local_world_size=WORLD_SIZE, num_nodes=1, master_addr="127.0.0.1", master_port=port,
            device="cpu", store_fd=-1,
        )  # fmt: skip
        processes.append(start.Process(target=rank_main, args=(env, rounds, rows, send)))
    for process in processes:
        process.start()
    send.close()
    try:
        found: dict[str, list[float]] = receive.recv()
    except EOFError:
        sys.exit("a rank failed")
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0, help="of the whole state")
    args = parser.parse_args()
    rows = int(args.gib * 2**30) // (WORLD_SIZE * NUM_TENSORS * COLUMNS * 4)
    with endpoint():
        seconds = measure(args.rounds, rows)
    size_mb = rows * WORLD_SIZE * NUM_TENSORS * COLUMNS * 4 / 1e6
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"{name:<11} {middle:6.2f} s  {size_mb / middle:6.0f} MB/s  ({min(found):.2f} to {max(found):.2f} s)")
    ours, raw, dcp = (seconds[name] for name in SIDES)
    print(f"dtrain / raw upload  {statistics.median(a / b for a, b in zip(ours, raw, strict=True)):.2f}")
    print(f"DCP + s3fs / dtrain  {statistics.median(c / a for a, c in zip(ours, dcp, strict=True)):.2f}")


if __name__ == "__main__":
    main()
