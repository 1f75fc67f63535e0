"""Loads functions of the user that a setting names: `module:function`, or `path/to/file.py:function`.

The module is looked for where Python looks for modules, a file where it lies. Loading it runs its code.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from indexing.declare import refuse


def load_function(setting: str, name: str, *, allowed: str, signature: str, num_arguments: int) -> Callable[..., Any]:
    """Return the function that `setting` names. It is called with `num_arguments` positional arguments. Errors show the
    `signature` to the user, and the values that are `allowed` besides.

    Raises ValueError if module or function do not exist, and for a function that does not take the arguments.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise refuse(setting, name, f"must be {allowed}, with the signature {signature}")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's code may raise anything
        why = f"it cannot be loaded: {type(error).__name__}: {error}"
        raise refuse(setting, name, f"must be {allowed}, with the signature {signature}; {why}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise refuse(setting, name, f"must be a function: {place} has no {attribute!r}; wanted is {signature}")
    try:
        inspect.signature(function).bind(*range(num_arguments))
    except TypeError as error:
        raise refuse(setting, name, f"must have the signature {signature}: {error}") from None
    except ValueError:  # the function has no readable signature
        pass
    return function


def with_absolute_file(name: str) -> str:
    """Return `file.py:function` with the absolute path of the file; other names as they are."""
    file, colon, function = name.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if colon and file.endswith(".py") else name


def _module_of_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"tandem_plug_in_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
