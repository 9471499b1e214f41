"""The configuration files of a Slurm cluster for tests, as text: which partitions, which timings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CPUS = 4  # of each node, whatever the machine has
MEMORY_MIB = 2000

# Partitions, lowest priority last: jobs in `main` push out those in the others.
PARTITIONS = """\
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=off
PartitionName=low PriorityTier=1 PreemptMode=requeue GraceTime=0
PartitionName=lowgrace PriorityTier=1 PreemptMode=requeue GraceTime=5
PartitionName=lowcancel PriorityTier=1 PreemptMode=cancel GraceTime=5
"""

# Timings as short as they work; the rest is what a plain cluster has.
SETTINGS = {
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "MailProg": "/bin/true",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/linux",
    "PropagateResourceLimits": "NONE",
    "SwitchType": "switch/none",
    "MpiDefault": "none",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_min_interval=50000,sched_interval=2,bf_interval=2,batch_sched_delay=0",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": "100",
    "SlurmdParameters": "config_overrides",
    "PriorityType": "priority/basic",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "ReturnToService": "2",
    "JobRequeue": "1",
    "SlurmdTimeout": "3",
    "SlurmctldTimeout": "5",
    "BatchStartTimeout": "10",
    "MessageTimeout": "2",
    "TCPTimeout": "2",
    "InactiveLimit": "0",
    "KillWait": "5",
    "UnkillableStepTimeout": "60",
    "WaitTime": "0",
    "CompleteWait": "0",
    "MinJobAge": "3600",
    "AccountingStorageType": "accounting_storage/none",
    "SlurmctldDebug": "verbose",
    "SlurmdDebug": "verbose",
}


def render(
    root: Path, name: str, controller: str, nodes: Mapping[str, str], *, gpus: int, settings: Mapping[str, str]
) -> dict[str, str]:
    """File name -> text. `controller` is the address of machine `ctl`, `nodes`: name -> address.

    `gpus` a node are declared as root/dev/nvidia0 and so on. `settings` overrides lines of slurm.conf.
    """
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    lines = {
        "ClusterName": name,
        "SlurmctldHost": f"ctl({controller})",
        # A requeued job waits as long as a credential is valid: 120 s by default.
        "AuthInfo": f"socket={root}/run/munge,cred_expire=8",
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool/%n",
        "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
        "SlurmdPidFile": f"{root}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{root}/log/slurmctld.log",
        "SlurmdLogFile": f"{root}/log/slurmd.%n.log",
        **({"GresTypes": "gpu"} if gpus else {}),
        **SETTINGS,
        **settings,
    }
    text = "".join(f"{key}={value}\n" for key, value in lines.items())
    for node, address in nodes.items():
        shape = f"CPUs={CPUS} RealMemory={MEMORY_MIB}{gres}"
        text += f"NodeName={node} NodeAddr={address} NodeHostname={node} {shape} State=UNKNOWN\n"
    files = {"slurm.conf": text + PARTITIONS, "cgroup.conf": "CgroupAutomount=no\nIgnoreSystemd=yes\n"}
    if gpus:
        files["gres.conf"] = "".join(
            f"NodeName={node} Name=gpu File={root}/dev/nvidia[0-{gpus - 1}]\n" for node in nodes
        )
    return files
