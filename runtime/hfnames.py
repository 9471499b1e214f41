"""The names under which transformers stores the weights of its models, where they are not those of the model itself.

Since version 5 a ViT's `vit.layers.0.mlp.fc1.weight` is still `vit.encoder.layer.0.intermediate.dense.weight` in its
files. Asked of the plain model: transformers knows models by the names of their classes, which sharding changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from dtrain.cluster.errors import UsageError

Translate = Callable[[Iterable[str]], dict[str, str]]  # stored names -> {stored name: name in the model}


def as_they_are(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def names_from_files(module: nn.Module) -> Translate:
    """As from_pretrained() reads them, the prefix of a base model added or dropped. Models that are not transformers'
    have no other names.

    What it returns raises UsageError for a weight whose content would have to be converted too.
    """
    model = _as_transformers(module)
    if model is None:
        return as_they_are
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix: Any = model.base_model_prefix

    def translate(names: Iterable[str]) -> dict[str, str]:
        found = {}
        for name in sorted(names, key=dot_natural_key):
            here, converted = rename_source_key(name, renamings, converters, prefix, own)
            if converted is not None and name not in own:
                raise UsageError(
                    f"model.init_from: {name} is stored in another form than {type(model).__name__} has it, and would "
                    "have to be converted. Let model._target_ call from_pretrained() instead of init_from"
                )
            found[name] = name if name in own else here
        return found

    return translate


def names_for_files(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name in the model: name in a file}, as save_pretrained() writes them; unchanged where it would convert too,
    which from_pretrained() reads as well."""
    listed = list(names)
    model = _as_transformers(module)
    if model is None:
        return as_they_are(listed)
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tensors = {name: state[name] for name in listed if name in state}
    owners = {id(tensor): name for name, tensor in tensors.items()}
    try:
        written = {owners[id(tensor)]: name for name, tensor in revert_weight_conversion(model, tensors).items()}
    except KeyError:  # a tensor that is none of the model's: it was converted
        return as_they_are(listed)
    return {name: written.get(name, name) for name in listed}


def _as_transformers(module: nn.Module) -> Any:
    """The module where it is a model of transformers', else None. Imports nothing: such a model has done so."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return module if modeling is not None and isinstance(module, modeling.PreTrainedModel) else None
