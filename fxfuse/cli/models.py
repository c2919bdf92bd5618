"""The model that MODEL names on the command line: found, imported and built, or a sentence why not."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

FORMS = "timm:NAME, torchvision:NAME, package.module:factory or path.py:factory"


class UsageError(Exception):
    """What the user typed cannot work; the message names the culprit and the remedy."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def load(target: str) -> nn.Module:
    """The model that MODEL names.

    Raises:
        UsageError: it cannot be found, imported or built.
    """
    zoo, _, name = target.partition(":")
    if zoo in ("timm", "torchvision") and name:
        return _from_zoo(zoo, name)
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise UsageError(f"{target!r} names no model: give {FORMS}")
    found: Any = _import_file(Path(place)) if place.endswith(".py") else _import(place, [Path.cwd()])
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except Exception as error:  # a module may compute its attributes
            there = getattr(found, "__dict__", {})
            offered = {n for n, v in there.items() if isinstance(v, nn.Module) or _makes_modules(v)}
            raise UsageError(f"{place} has no {name!r}; {_instead(name, offered)}") from error
    return found if isinstance(found, nn.Module) else _build(found, target)


def _makes_modules(value: Any) -> bool:
    return issubclass(value, nn.Module) if isinstance(value, type) else inspect.isfunction(value)


def _instead(name: str, offered: Iterable[str]) -> str:
    """What else there is: the names alike, or all while they are few."""
    names = sorted(offered)
    close = get_close_matches(name, names, 3, 0.5) or (names if len(names) <= 12 else [])
    return f"did you mean {' or '.join(close)}?" if close else "check the spelling"


def _from_zoo(zoo: str, name: str) -> nn.Module:
    package = _import("timm" if zoo == "timm" else "torchvision.models", [])
    everything = package.list_models()
    if not (package.is_model(name) if zoo == "timm" else name in everything):
        raise UsageError(f"{zoo} has no model {name!r}; {_instead(name, everything)}")
    if zoo == "timm":
        return _build(lambda: package.create_model(name, pretrained=False), f"timm:{name}")
    builder = package.get_model_builder(name)
    none = {k: None for k in ("weights", "weights_backbone") if k in inspect.signature(builder).parameters}
    return _build(lambda: builder(**none), f"torchvision:{name}")


def _build(factory: Any, target: str) -> nn.Module:
    if not callable(factory):
        kind = type(factory).__name__
        raise UsageError(f"{target} is of type {kind}: name an nn.Module, or a class or function that makes one")
    try:
        model = factory()
    except Exception as error:
        raise UsageError(
            f"{target} does not build: {_named(error)}; name a class or function that works without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{target} gives an object of type {type(model).__name__}: it has to give an nn.Module")
    return model


def _import(name: str, folders: list[Path]) -> ModuleType:
    """A module by its dotted name, looked for in `folders` first."""
    sys.path[:0] = [str(folder) for folder in folders]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if missing == name or name.startswith(f"{missing}."):
            raise UsageError(f"there is no module {missing}: install it, or run where it can be imported") from error
        raise UsageError(f"{name} cannot be imported: it needs {missing}; install that") from error
    except (Exception, SystemExit) as error:  # importing runs anything, and anything may go wrong in it
        remedy = f"install versions that fit torch {torch.__version__}" if not folders else "mend that first"
        raise UsageError(f"{name} cannot be imported: {_named(error)}; {remedy}") from error


def _import_file(path: Path) -> ModuleType:
    """A file as a module, under its dotted name where it lies in packages so that relative imports work."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    path = path.resolve()
    names, folder = [path.stem] if path.stem != "__init__" else [], path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    module = _import(".".join(names), [folder, Path.cwd(), path.parent])
    if Path(str(module.__file__)).resolve() != path:
        raise UsageError(f"{path} has the name of the module {module.__name__}, which is in use already: rename it")
    return module
