# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Data: the sources of a YAML mixture become one set of records, stored and decoded by `datasets`.

A mixture has the parts `train`, `eval` and `test`, each a list of entries; `source` names one of `SOURCES`, and the
other keys are its fields.
"""

import math
import random
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets import Dataset, IterableDataset

from . import dialogues_moevlm as dialogues
from . import records_moevlm as records
from . import scenes_moevlm as drawn
from . import sources_moevlm as sources
from .records_moevlm import Entry, check_known
from .sources_moevlm import SOURCES, Scenes

PARTS = ("train", "eval", "test")
NOT_KEYS = ("folder", "place")
NOT_STORED = ("weight", "stage", "shift", *NOT_KEYS)


@dataclass
class DataArguments:
    """What is trained on and how much of it."""

    data: str | None = field(default=None, metadata={"help": "Mixture (yaml); configs/data/default.yaml if absent."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a sequence at most; whole turns go."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that encode records."})
    max_samples: int | None = field(default=None, metadata={"help": "Training records at most."})
    eval_max_samples: int | None = field(default=512, metadata={"help": "Records to evaluate on while training."})
    test_max_samples: int | None = field(default=None, metadata={"help": "Test records at most at the end."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Count and report broken rows instead of stopping."})

    def __post_init__(self):
        for name in ("max_length", "max_samples", "eval_max_samples", "test_max_samples", "preprocessing_num_workers"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1; null (in a recipe) is no bound")


def mixture_parts(path: str | Path) -> list[str]:
    """Give the parts that a mixture file has."""
    return list(_mixture(Path(path)))


def load_mixture(
    path: str | Path, part: str, *, grouped: bool, skip_bad_rows: bool = False, most_of_a_stream: int | None = None
) -> Dataset | IterableDataset:
    """Give the records of one part of a mixture file; an IterableDataset if any of its sources streams.

    Args:
        path: The YAML file.
        part: "train", "eval" or "test"; a file without "test" gives its "eval".
        grouped: For training: all questions (or captions) of a picture are turns of one record. Otherwise, for scoring:
            one record a question (or captioned picture), with its `answers` (or `references`).
        skip_bad_rows: Leave out rows that cannot be used and log how many, instead of raising.
        most_of_a_stream: Where any source streams, so many records at most: of all for training, else of each source.

    Raises:
        ValueError: For an unknown key, a value out of bounds, a bad row: each names its place and the way out.
        FileNotFoundError: For a file, folder or picture that is not there.
        ImportError: For a source whose package is not installed.
    """
    path = Path(path)
    mixture = _mixture(path)
    check_known(str(path), part, PARTS)
    part = "eval" if part == "test" and "test" not in mixture else part
    if part not in mixture:
        raise ValueError(
            f"{path}: has no part {part!r}, only {', '.join(mixture)}; add `{part}:` with a list of entries"
        )
    entries = [_entry(spec, path.parent, f"{path}: {part}[{i}]", part) for i, spec in enumerate(mixture[part])]
    parts = []
    for entry in entries:
        if getattr(entry, "streaming", False):
            parts.append(entry.stream(grouped=grouped, skip=skip_bad_rows))
        else:
            stored = _stored(entry, grouped=grouped, skip=skip_bad_rows)
            parts.append(_for_training(stored, entry) if part == "train" else stored)
    if not any(isinstance(one, IterableDataset) for one in parts):
        return datasets.concatenate_datasets(parts)
    parts = [_as_stream(one) if isinstance(one, Dataset) else one for one in parts]
    most = most_of_a_stream
    if part != "train" or len(parts) == 1:
        return datasets.concatenate_datasets(parts if most is None else [one.take(most) for one in parts])
    total = sum(entry.weight for entry in entries)
    # A stream has no length: weights are the shares in which the sources are drawn, short ones again and again.
    shares = [entry.weight / total for entry in entries]
    mixed = datasets.interleave_datasets(parts, shares, seed=entries[0].seed, stopping_strategy="all_exhausted")
    return mixed if most is None else mixed.take(most)


def _as_stream(stored: Dataset) -> IterableDataset:
    """A stored set beside streams: its pictures are decoded here, since behind a stream `datasets` decodes none."""

    def decode(images):
        return {"images": [records.decoded(image) for image in images]}

    return stored.to_iterable_dataset().map(decode, input_columns="images", features=stored.features)


def _stored(entry: Entry, *, grouped: bool, skip: bool) -> Dataset:
    code = [Path(file).read_text() for file in (sources.__file__, drawn.__file__, dialogues.__file__)]
    asked = {one.name: getattr(entry, one.name) for one in fields(entry) if one.name not in NOT_STORED}
    version = (code, type(entry).__name__, asked, entry.versions(), grouped)
    return records.store(partial(entry.chosen_units, grouped=grouped), entry.place, version, skip=skip)


def _for_training(dataset: Dataset, entry: Entry) -> Dataset:
    """Repeat the records `weight` times, the fraction drawn by the seed; each copy gets its stage, its shift, and the
    number of its record, by which copies are known as such."""
    dataset = dataset.add_column("record", [f"{entry.place} {row}" for row in range(len(dataset))])
    whole, rest = int(entry.weight), round(entry.weight % 1 * len(dataset))
    parts = [dataset] * whole
    if rest or not whole:
        parts.append(dataset.shuffle(seed=entry.seed).take(max(rest, 1)))
    copies = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    draw = random.Random(entry.seed).randint
    shifts = [[draw(-entry.shift, entry.shift) for _ in "xy"] for _ in range(len(copies))]
    return copies.add_column("stage", [entry.stage] * len(copies)).add_column("shift", shifts)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first one would be lost."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{sorted(twice)} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _mixture(path: Path) -> dict[str, list]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a mixture file such as configs/data/default.yaml")
    try:
        mixture = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(mixture, dict) or not mixture:
        raise ValueError(f"{path}: holds no parts; write `train:` and below it one `- {{source: …}}` a line")
    for part, entries in mixture.items():
        check_known(str(path), part, PARTS)
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: {part} is {entries!r}; make it a list of entries: `- {{source: …}}`")
    return mixture


def _entry(spec: Any, folder: Path, place: str, part: str) -> Entry:
    if not isinstance(spec, dict) or "source" not in spec:
        raise ValueError(f"{place}: {spec!r} names no source; write {{source: …}}, one of {', '.join(SOURCES)}")
    check_known(f"{place}: source", spec["source"], SOURCES)
    kind = SOURCES[spec["source"]]
    known = {one.name: one for one in fields(kind) if one.name not in NOT_KEYS}
    values = {"split": part} if kind is Scenes else {}
    for key, value in spec.items():
        if key != "source":
            check_known(place, key, known)
            values[key] = _value_of(f"{place}: {key}", value, known[key].type, folder, kind.CHOICES.get(key))
    missing = [name for name, one in known.items() if one.default is MISSING and name not in values]
    if missing:
        raise ValueError(f"{place}: source {spec['source']} needs {', '.join(missing)}; add it")
    for key in ("size", "weight"):
        if values.get(key) is not None and not 0 < values[key] < math.inf:
            raise ValueError(f"{place}: {key} is {values[key]}; it must be above 0, and finite")
    if values.get("weight", 1) != 1 and part != "train":
        raise ValueError(f"{place}: weight={values['weight']} outside train would score records twice; remove it")
    if values.get("shift", 0) < 0:
        raise ValueError(f"{place}: shift={values['shift']} is negative; give the largest shift in pixels, or 0")
    if values.get("shift") and values.get("streaming"):
        raise ValueError(f"{place}: shift={values['shift']} needs stored records; remove it or streaming: true")
    return kind(folder=folder, place=place, **values)


def _value_of(place: str, value: Any, kind: Any, folder: Path, choices: tuple | None) -> Any:
    """Check one value of an entry, and resolve it if it is a path."""
    accepted = {Path: str, float: int | float}.get(kind, kind)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place} is {value!r}; it must be {getattr(accepted, '__name__', accepted)}")
    if choices and value is not None:
        for one in value if isinstance(value, list) else [value]:
            check_known(place, one, choices)
    if kind is not Path:
        return value
    if not (folder / value).exists():
        raise FileNotFoundError(f"{place}: {folder / value} does not exist; paths are relative to the mixture file")
    return folder / value
