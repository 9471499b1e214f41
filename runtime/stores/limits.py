"""How long and how often a store is asked, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """A request that fails on the way is tried again, each time after a longer wait, until `retry_s` seconds or
    `max_retries` tries are over.

    Memory: an upload sends from where the bytes lie; one of at most `part_bytes` is copied once. A read holds at most
    `concurrency` x `part_bytes` beyond its target. So 64 MiB a thread that reads, 16 MiB a thread that writes.
    """

    connect_s: float = 5.0
    silent_s: float = 20.0  # without a byte from the store: a reply that stalls is asked for again
    request_s: float = 120.0  # one try in all: a line must carry concurrency x part_bytes in that time, 0.6 MB/s
    retry_s: float = 300.0
    max_retries: int = 40
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0
    part_bytes: int = 16 * MIB  # of a multipart upload, and of one read
    concurrency: int = 4
    max_parts: int = 10_000  # S3's

    def part_bytes_for(self, size_bytes: int) -> int:
        """Of an upload: larger where there would be too many parts, in whole MiB."""
        least = -(-size_bytes // self.max_parts)
        return max(self.part_bytes, -(-least // MIB) * MIB)
