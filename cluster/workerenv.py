"""The one module that reads and writes environment variables between the agent's world and the worker's.

A back end translates its own world (SLURM_*, a Pod's name, a host file) into a WorkerEnv; the worker, and any script
that torchrun runs, sees only these variables. The torchrun names are documented at
https://pytorch.org/docs/stable/elastic/run.html#environment-variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnv:
    run_dir: str
    name: str
    job_id: str
    attempt: int
    global_rank: int
    local_rank: int
    node_rank: int
    world_size: int
    local_world_size: int
    num_nodes: int
    master_addr: str
    master_port: int
    interface: str = ""  # the name of the one that master_addr belongs to; gloo and NCCL are to use it
    device: str  # "cpu" or "cuda:<local index>"
    resume_step: int = 0  # the committed step that this attempt starts from; 0: from the beginning
    resume_attempt: int = 0  # the attempt that committed it
    max_restarts: int = 0  # in a row, without progress
    # File descriptors inherited from the agent; -1 where there is none.
    store_fd: int = -1  # a listening socket for global rank 0's TCPStore
    progress_fd: int = -1  # the shared-memory progress record
    report_fd: int = -1  # a pipe of JSON lines to the agent: events and failure reports

    def to_environ(self) -> dict[str, str]:
        return {
            "DTRAIN_RUN_DIR": self.run_dir,
            "DTRAIN_NAME": self.name,
            "DTRAIN_JOB_ID": self.job_id,
            "DTRAIN_ATTEMPT": str(self.attempt),
            "DTRAIN_DEVICE": self.device,
            "DTRAIN_INTERFACE": self.interface,
            "DTRAIN_RESUME_STEP": str(self.resume_step),
            "DTRAIN_RESUME_ATTEMPT": str(self.resume_attempt),
            "DTRAIN_STORE_FD": str(self.store_fd),
            "DTRAIN_PROGRESS_FD": str(self.progress_fd),
            "DTRAIN_REPORT_FD": str(self.report_fd),
            "RANK": str(self.global_rank),
            "LOCAL_RANK": str(self.local_rank),
            "GROUP_RANK": str(self.node_rank),
            "ROLE_RANK": str(self.global_rank),
            "ROLE_NAME": "default",
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "ROLE_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RUN_ID": self.job_id,
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt - 1),
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
        }

    def traffic_environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What gloo and NCCL read to find their interface, less what the user has set. NCCL looks for prefixes unless
        told otherwise, and finds its own way on loopback, where all ranks share a machine."""
        wanted = {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": f"={self.interface}"}
        if self.master_addr.startswith("127.") or self.master_addr == "::1":
            del wanted["NCCL_SOCKET_IFNAME"]
        return {name: value for name, value in wanted.items() if self.interface and name not in environ}

    @staticmethod
    def from_environ(environ: Mapping[str, str]) -> WorkerEnv:
        return WorkerEnv(
            run_dir=environ["DTRAIN_RUN_DIR"],
            name=environ["DTRAIN_NAME"],
            job_id=environ["DTRAIN_JOB_ID"],
            attempt=int(environ["DTRAIN_ATTEMPT"]),
            global_rank=int(environ["RANK"]),
            local_rank=int(environ["LOCAL_RANK"]),
            node_rank=int(environ["GROUP_RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_world_size=int(environ["LOCAL_WORLD_SIZE"]),
            num_nodes=int(environ["GROUP_WORLD_SIZE"]),
            master_addr=environ["MASTER_ADDR"],
            master_port=int(environ["MASTER_PORT"]),
            device=environ["DTRAIN_DEVICE"],
            interface=environ.get("DTRAIN_INTERFACE", ""),
            resume_step=int(environ.get("DTRAIN_RESUME_STEP", "0")),
            resume_attempt=int(environ.get("DTRAIN_RESUME_ATTEMPT", "0")),
            max_restarts=int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")),
            store_fd=int(environ.get("DTRAIN_STORE_FD", "-1")),
            progress_fd=int(environ.get("DTRAIN_PROGRESS_FD", "-1")),
            report_fd=int(environ.get("DTRAIN_REPORT_FD", "-1")),
        )


def script_environ(env: WorkerEnv, environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun sets besides, for a script that expects it; nothing here replaces what the user has set."""
    wanted = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    if env.master_addr.startswith("127."):  # on loopback gloo must not look the host name up
        wanted["GLOO_SOCKET_IFNAME"] = "lo"
    ours = {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # runtime/scriptstore.py serves it
    return {**ours, **{name: value for name, value in wanted.items() if name not in environ}}
