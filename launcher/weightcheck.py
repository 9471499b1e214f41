"""Whether the weights that `model.init_from` names can be found, before anything starts: the headers of their files are
read, none of their bytes. Whether they fit the model shows when the workers have built it.
"""

from __future__ import annotations

from dtrain.cluster.errors import Problem, StorageError, UsageError
from dtrain.cluster.storage import IMPATIENT_RETRY_S
from dtrain.launcher.compose import LaunchConfig
from dtrain.runtime.config import RunConfig
from dtrain.runtime.weightfiles import find_weights
from dtrain.runtime.weightmatch import rename


def begins_with_weights(config: LaunchConfig) -> bool:
    """A run that goes on from a checkpoint does not look at them."""
    return isinstance(config.content, RunConfig) and config.content.model.init_from is not None


def check_weights(config: LaunchConfig) -> list[Problem]:
    """With the file:line of the URL or the map."""
    init = config.run.model.init_from
    assert init is not None
    key = "model.init_from.url"
    try:
        rename(find_weights(init.url, retry_s=IMPATIENT_RETRY_S).tensors, init.map)
    except UsageError as error:
        if str(error).startswith("model.init_from.map: "):
            key = "model.init_from.map"
        message = str(error).removeprefix(f"{key}: ").removeprefix("checkpoint.url: ")
    except StorageError as error:
        message = str(error)
    else:
        return []
    place = config.origins.get(key) or config.origins.get("model.init_from.url", "")
    return [Problem(where=place, key=key, message=message)]
