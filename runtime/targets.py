"""From a Target's dotted name to the user's callable, and whether its keywords fit the signature. Torch-free.

Errors are UsageErrors in words; which key of which file they belong to is known to the caller (Target.where).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from dtrain.cluster.configfile import nearest
from dtrain.cluster.errors import UsageError
from dtrain.runtime.config import Target

_ABSENT = object()
_KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_POSITIONAL_KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def resolve(dotted: str) -> Any:
    """What `package.module.name` names; modules are imported as far as needed. Raises UsageError."""
    first, *rest = dotted.split(".")
    found = _import(first)
    if found is _ABSENT:
        near = nearest(first, (module.name for module in pkgutil.iter_modules()), cutoff=0.75)
        hint = f"Did you mean {near}?" if near else "Is it installed, or beside the config?"
        raise UsageError(f"{dotted}: there is no module {first}. {hint}")
    done = first
    for name in rest:
        found, done = _member(dotted, found, done, name), f"{done}.{name}"
    return found


def build(target: Target, *args: Any, more: Mapping[str, Any] | None = None) -> Any:
    """The target called with `args` and its keywords, and `more` of them."""
    return _callable(target)(*args, **target.kwargs, **(more or {}))


def takes(target: Target, keywords: Sequence[str]) -> bool:
    """Whether the signature has all of `keywords` by name, and the config gives none of them."""
    try:
        parameters = inspect.signature(_callable(target)).parameters
    except (UsageError, TypeError, ValueError):
        return False
    return all(name in parameters and name not in target.kwargs for name in keywords)


def as_callable(target: Target) -> Callable[..., Any]:
    """Something to call many times: a class is instantiated once with the keywords, a function gets them bound."""
    found = _callable(target)
    if isinstance(found, type):
        instance = found(**target.kwargs)
        if not callable(instance):
            raise UsageError(f"{target.target}: an instance of it cannot be called. Give the class a __call__ method.")
        return cast(Callable[..., Any], instance)
    return functools.partial(found, **target.kwargs) if target.kwargs else found


def check(target: Target, num_positional: int, *, instance: bool = False, offered: Sequence[str] = ()) -> str | None:
    """What speaks against calling the target with its keywords after `num_positional` arguments; None: nothing known.

    `instance`: as_callable() will be used, so a class is constructed with the keywords alone. `offered`: keywords that
    the runtime adds for a target that takes() them. Nothing is called here.
    """
    try:
        found = _callable(target)
    except UsageError as error:
        return str(error)
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # builtins without a text signature
        return None
    if instance and isinstance(found, type):
        if not any("__call__" in vars(base) for base in found.__mro__):
            return f"{target.target}: an instance of it cannot be called. Give the class a __call__ method."
        num_positional = 0
    added = dict.fromkeys(offered) if takes(target, offered) else {}
    faults = list(_signature_faults(signature, num_positional, {**target.kwargs, **added}))
    words = "; ".join(faults)
    return f"{target.target}{_shown(signature)}: {words}{'' if words.endswith('?') else '.'}" if faults else None


def check_settings(target: Target, settings: Iterable[str]) -> str | None:
    """What speaks against settings of an optimizer's parameter group: names that are near misses of its own keywords.

    Other unknown names pass: an optimizer may read keys from its groups that its constructor does not have.
    """
    try:
        signature = inspect.signature(_callable(target))
    except (UsageError, TypeError, ValueError):  # check() has said so
        return None
    keywords = [p.name for p in signature.parameters.values() if p.kind in _KEYWORD_KINDS]
    wrong = [(name, nearest(name, keywords)) for name in settings if name not in keywords]
    faults = [f"unknown setting {name}, did you mean {near}?" for name, near in wrong if near]
    return f"{target.target}: {' '.join(faults)}" if faults else None


def _callable(target: Target) -> Callable[..., Any]:
    found = resolve(target.target)
    if not callable(found):
        kind = "a module" if isinstance(found, types.ModuleType) else f"a value of type {type(found).__name__}"
        raise UsageError(f"{target.target} is {kind}, which cannot be called. Name a class or a function.")
    return cast(Callable[..., Any], found)


def _member(dotted: str, owner: Any, owner_name: str, name: str) -> Any:
    """`name` of a module or class, as `from owner import name` finds it: an attribute, else a submodule."""
    try:
        found = getattr(owner, name, _ABSENT)
    except Exception as error:  # modules that load lazily raise whatever their parts raise
        raise UsageError(f"{dotted}: {_raised(f'{owner_name}.{name}', error)}") from error
    is_package = isinstance(owner, types.ModuleType) and "__path__" in vars(owner)
    if found is _ABSENT and is_package:
        found = _import(f"{owner_name}.{name}")
    if found is not _ABSENT:
        return found
    names = [known for known in dir(owner) if not known.startswith("__")]
    if is_package:
        names += [module.name for module in pkgutil.iter_modules(owner.__path__)]
    near = nearest(name, names)
    hint = f"Did you mean {owner_name}.{near}?" if near else _contents(owner)
    kind = "module" if isinstance(owner, types.ModuleType) else "object"
    raise UsageError(f"{dotted}: the {kind} {owner_name} has no {name}. {hint}")


def _contents(owner: Any) -> str:
    """What a module has to offer, for a name that resembles nothing in it."""
    own = [
        name
        for name, value in vars(owner).items()
        if getattr(value, "__module__", "") == getattr(owner, "__name__", "")
    ]
    public = [name for name in own if not name.startswith("_")]
    place = getattr(owner, "__file__", None)
    found = f"It has {', '.join(public[:8])}" if public else "It defines nothing that can be called"
    return f"{found} ({place})." if place else f"{found}."


def _import(name: str) -> Any:
    """The module, or _ABSENT where there is none. Raises UsageError where importing it fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return _ABSENT
        raise UsageError(_raised(name, error)) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script without a __main__ guard may well call sys.exit()
        raise UsageError(_raised(name, error)) from error


def _raised(name: str, error: BaseException) -> str:
    last_line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}:{error.lineno})"
    return f"importing {name} raised {last_line}{place}. Fix it there."


def _signature_faults(signature: inspect.Signature, num_positional: int, kwargs: dict[str, Any]) -> Iterable[str]:
    parameters = list(signature.parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    positional = [p for p in parameters if p.kind in _POSITIONAL_KINDS]
    keywords = [p.name for p in parameters if p.kind in _KEYWORD_KINDS]
    if num_positional > len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        yield f"it is called with {num_positional} positional arguments, but takes {len(positional)}"
    taken = [p.name for p in positional[:num_positional]]
    for name in kwargs:
        if name in taken and name in keywords:
            yield f"{name} is passed by dtrain itself, so leave it out"
        elif name not in keywords and inspect.Parameter.VAR_KEYWORD not in kinds:
            near = nearest(name, [known for known in keywords if known not in taken])
            yield f"it has no parameter {name}" + (f", did you mean {near}?" if near else "")
    for parameter in parameters:
        required = parameter.default is parameter.empty and parameter.kind in (*_POSITIONAL_KINDS, *_KEYWORD_KINDS)
        if required and parameter.name not in taken and parameter.name not in kwargs:
            yield f"its argument {parameter.name} is required and missing"


def _shown(signature: inspect.Signature) -> str:
    """The parameters' names, short enough for a message."""
    text = f"({', '.join(signature.parameters)})"
    return text if len(text) <= 100 else text[:97] + "...)"
