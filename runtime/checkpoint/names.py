"""The names of everything under a checkpoint store's root, and back. Names that come from a store are checked here
before they become keys."""

from __future__ import annotations

import re

FORMAT_VERSION = 1
ATTEMPTS = "attempts/"
MANIFEST = "manifest.json"
SCORE = "evaluation.json"
DATA_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"

_STEP_DIR = re.compile(r"step-(\d{8,18})-a(\d{4,18})")
_ATTEMPT = re.compile(r"(\d{4,18})\.json")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def step_dir(step: int, attempt: int) -> str:
    """Without a slash: "step-00000100-a0003"."""
    return f"step-{step:08d}-a{attempt:04d}"


def parse_step_dir(name: str) -> tuple[int, int] | None:
    """(step, attempt), or None for a name that step_dir() would not give."""
    match = _STEP_DIR.fullmatch(name)
    if match is None:
        return None
    step, attempt = int(match[1]), int(match[2])
    return (step, attempt) if step_dir(step, attempt) == name else None


def manifest_key(directory: str) -> str:
    return f"{directory}/{MANIFEST}"


def score_key(directory: str) -> str:
    return f"{directory}/{SCORE}"


def attempt_key(number: int) -> str:
    return f"{ATTEMPTS}{number:04d}.json"


def parse_attempt_key(key: str) -> int | None:
    match = _ATTEMPT.fullmatch(key.removeprefix(ATTEMPTS))
    return int(match[1]) if match and attempt_key(int(match[1])) == key else None


def writer_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def is_file_name(name: str) -> bool:
    """Whether a manifest may name this file: one path component, nothing hidden."""
    return _FILE.fullmatch(name) is not None
