# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""A recipe: the flags of a command as a YAML file.

    learning_rate: 6e-4
    data: ../data/easy_vqa.yaml

Names and values are those of the command line, the names without the dashes; the command line wins over the file. null
is no value, such as no limit; a flag that takes several values keeps its default.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

# Relative ones are relative to the recipe's folder; models and outputs belong to the place where the command runs.
PATHS = ("data", "config")
NOT_GIVEN = ("", "null", "~")


def parse(groups: Sequence[type], arguments: Sequence[str]) -> tuple[Any, ...]:
    """The argument groups (dataclasses) filled from `--recipe FILE`, if given, and from the command line, which wins.

    Args:
        groups: Dataclasses; their fields are the flags.
        arguments: The command line without the program's name.

    Returns:
        An instance of each group, in their order.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: The recipe is no YAML mapping, or has an unknown key or a value that its flag does not take.
    """
    parser = HfArgumentParser(groups, allow_abbrev=False)
    parser.add_argument("--recipe", metavar="FILE", help="Flags as a YAML file; flags on the command line win over it.")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    if path := finder.parse_known_args(arguments)[0].recipe:
        parser.set_defaults(**read_recipe(Path(path), parser))
    *filled, _ = parser.parse_args_into_dataclasses(list(arguments))  # the last one holds the recipe's path
    return tuple(filled)


def read_recipe(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The values of a recipe by flag, as the parser makes them from the command line; errors as in `parse`."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe={path} is no file; configs/recipes holds some")
    try:
        # Words only: each flag reads its own, as on the command line, so `no` stays a word where a word is wanted.
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no flags; write one 'name: value' a line")
    flags = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "recipe")}
    for key in found:
        if key not in flags:
            close = difflib.get_close_matches(str(key), flags, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists the flags"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
    values = {key: converted(value, flags[key], f"{path}: {key}") for key, value in found.items()}
    for key in PATHS:
        if values.get(key):
            values[key] = str(path.resolve().parent / values[key])
    return values


def converted(value: Any, flag: argparse.Action, where: str) -> Any:
    """A word, or a list of words, of the file in its flag's type.

    Raises:
        ValueError: The flag does not take this value.
    """
    several = flag.nargs in ("+", "*")
    if value in NOT_GIVEN:
        return flag.default if several else None
    if isinstance(value, list) and not several:
        raise ValueError(f"{where}={value} is a list, but the flag takes one value")
    if isinstance(value, dict):
        raise ValueError(f"{where}={value} is a mapping; write it as JSON in single quotes, as on the command line")
    if several:
        return [typed_word(word, flag, where) for word in (value if isinstance(value, list) else [value])]
    return typed_word(value, flag, where)


def typed_word(word: str, flag: argparse.Action, where: str) -> Any:
    """One word in its flag's type; raises as `converted`."""
    try:
        typed = flag.type(word) if flag.type else word
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where}={word} is not a value of this flag: {error}") from error
    if flag.choices and typed not in flag.choices:
        raise ValueError(f"{where}={word} must be one of {', '.join(map(str, flag.choices))}")
    return typed
