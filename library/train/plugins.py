"""Optimizer and scheduler classes by name, and the arguments that users write for them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from library.log import ResourceError, UserError

PIP_NAMES = {"lion_pytorch": "lion-pytorch"}
"""Package -> what to install for it, where the names differ."""


def load_class(name: str, default_package: str, option: str) -> Any:
    """The class `package.module.Class`, or `Class` of the default package.

    Errors: ResourceError when the package isn't installed, UserError when it has no such class.
    """
    module_name, _, class_name = name.rpartition(".")
    module_name = module_name or default_package
    package = module_name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ResourceError(
            f"{class_name} needs the package {package}, which isn't installed",
            f"{option} {name}",
            f"pip install {PIP_NAMES.get(package, package)}",
            code="E-PACKAGE",
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(str(error), f"{option} {name}", "check the spelling", code="E-CLASS") from error


def literal_arguments(items: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Keyword arguments from `key=value` items, values being Python literals; the first "=" divides.

    Errors: UserError for an item without "=", or with a value that is no literal.
    """
    arguments = {}
    for item in items or ():
        key, equals, text = item.partition("=")
        try:
            if not equals or not key.strip():
                raise ValueError
            arguments[key.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise UserError(
                f"{item!r} can't be read",
                option,
                'write key=value with a number, True, False, None, "text" or (a, tuple)',
                code="E-ARGS",
            ) from None
    return arguments
