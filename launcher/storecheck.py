"""Whether checkpoints can be written where the config wants them, tried for real before anything starts. For stores
behind a network; a directory is looked at by launcher/checks.py, without touching it."""

from __future__ import annotations

from dtrain.cluster.errors import ConfigError, Problem, StorageError, UsageError
from dtrain.cluster.mirror import is_url
from dtrain.cluster.rundir import RunDir, refresh
from dtrain.cluster.storage import open_storage, scheme_of
from dtrain.launcher.compose import LaunchConfig
from dtrain.launcher.screen import saying

TIMEOUT_S = 15.0
KEY = "checkpoint.url"


def check_store(config: LaunchConfig) -> None:
    """Raises ConfigError with the place of checkpoint.url, after TIMEOUT_S at the latest."""
    if is_url(config.run_dir):
        _check_run_dir(config)
    url = config.content.checkpoint.url
    if scheme_of(url) == "file":
        return
    try:
        with saying(f"{config.name}: trying {url} ..."):
            open_storage(url).check_writable(TIMEOUT_S)
    except UsageError as error:
        problem = Problem(where=config.origins.get(KEY, ""), key=KEY, message=str(error))
        raise ConfigError([problem]) from error


def _check_run_dir(config: LaunchConfig) -> None:
    """Also brings the records of the run here."""
    try:
        with saying(f"{config.name}: trying {config.run_dir} ..."):
            open_storage(config.run_dir).check_writable(TIMEOUT_S)
            refresh(RunDir(config.run_dir).path)
    except (UsageError, StorageError) as error:
        problem = Problem(where=config.origins.get("run_dir", ""), key="run_dir", message=str(error))
        raise ConfigError([problem]) from error
