"""Defenses that a file holds in another form than a class: an instance, or a function that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import nn

from robench.data_names import KNOWN
from robench.defense import Defense
from robench.errors import PluginError, UsageError
from robench.registry import check_switch, plugin_errors


def make_defense(name: str, found: object, dataset: str | None, options: Mapping[str, Any]) -> Defense:
    """The defense that a name stands for where it is no class: an instance as it is, or what a function returns.

    Args:
        name: by which it was found, for messages.
        found: what bears the name.
        dataset: for the advice to one who has to wrap a plain module.
        options: passed to a function; an instance takes none.

    Raises:
        UsageError: options that it does not take, or a plain torch module; says how to wrap it.
        PluginError: the function raised, or there is no defense.
    """
    what, code = f'defense "{name}"', name.rpartition(":")[2]
    if isinstance(found, Defense):
        if options:
            raise UsageError(
                f"{what} is made already and takes no options; got {', '.join(options)}. "
                "Name its class, or a function that makes it"
            )
        return found
    if callable(found) and not isinstance(found, type | nn.Module):
        code = f"{code}()"
        found = _call(what, found, options)
        if isinstance(found, Defense):
            return found
    if isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module)):
        code = f"{code}()" if isinstance(found, type) else code
        raise UsageError(_advise(name, code, dataset))
    raise PluginError(
        f"{what} must be a class that extends robench.Defense, an instance of one, or a function that returns one; "
        f"got {found!r}"
    )


def _call(what: str, make: Any, options: Mapping[str, Any]) -> object:
    bind_options(what, make, options)
    with plugin_errors(what):
        return make(**options)


def bind_options(what: str, make: Any, options: Mapping[str, Any]) -> None:
    """Checks that what makes a defense, a class or a function, takes these options.

    Raises:
        UsageError: it has no such option, or one that is true or false got a text.
    """
    signature = inspect.signature(make)
    try:
        given = signature.bind(**options).arguments
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        raise UsageError(f"{what}: {error}; its options are: {takes}") from None
    for name, value in given.items():
        check_switch(what, name, signature.parameters[name].default, value)


def _advise(name: str, code: str, dataset: str | None) -> str:
    """What to write where a plain module stands: a line in its file, and the name of what that makes."""
    place = name.rpartition(":")[0] or name
    known = KNOWN.get(dataset or "fashion_mnist")
    classes, shape = (known.num_classes, known.image_shape) if known else ("...", "(channels, height, width)")
    return (
        f'defense "{name}" is a plain torch module. Write into {place}: '
        f"defense = robench.wrap({code}, num_classes={classes}, input_shape={shape}) and take --defense {place}:defense"
    )


def find_only_defense(place: str, module: ModuleType) -> object:
    """The one defense that a file defines: a class of its own, else an instance.

    Raises:
        UsageError: it defines none or several; says which.
    """
    own = {key: one for key, one in vars(module).items() if getattr(one, "__module__", "") == module.__name__}
    classes = {key: one for key, one in own.items() if isinstance(one, type) and issubclass(one, Defense)}
    instances = {key: one for key, one in vars(module).items() if isinstance(one, Defense)}
    found = classes or instances
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(f"{place}:{key}" for key in {**classes, **instances})
        raise UsageError(f"{place} holds several defenses; name one: {names}")
    modules = [key for key, one in own.items() if isinstance(one, type) and issubclass(one, nn.Module)]
    if modules:
        raise UsageError(_advise(place, f"{modules[0]}()", None))
    raise UsageError(f"{place} holds no robench.Defense; name a function that returns one: {place}:NAME")
