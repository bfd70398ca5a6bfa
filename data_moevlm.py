# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Data: picture-text sources, listed in a YAML mixture, become one record form, stored and decoded by `datasets`.

A mixture has the parts `train`, `eval` and `test`, each a list of entries; `source` names a class of this file (scenes,
easy_vqa, coco_captions, vqav2, chat, hub) and the other keys are its fields. Paths are relative to the YAML file.
"""

import importlib.util
import io
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import yaml
from datasets import Dataset, IterableDataset

from . import records_moevlm as records
from . import scenes_moevlm as drawn
from .records_moevlm import FEATURES, Asked, Entry, RowError, Rows, Unit, check_known, listed, need

PARTS = ("train", "eval", "test")
TASKS = ("caption", "vqa", "chat")
CAPTION_PROMPT = "Describe the picture."
NOT_KEYS = ("folder", "place")
NOT_STORED = ("weight", "stage", "shift", *NOT_KEYS)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scenes(Entry):
    """Drawn shapes, `max_shapes` at most; `size` counts pictures, each with a caption, questions and a dialogue."""

    split: str = "train"
    size: int = 1000
    max_shapes: int = drawn.MAX_SHAPES
    tasks: list = TASKS

    CHOICES = {"split": drawn.SPLITS, "tasks": TASKS}

    def chosen(self, units: Iterator[Unit]) -> Iterable[Unit]:
        return units

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        for scene in drawn.scenes(self.split, self.size, self.seed, self.max_shapes):
            png = io.BytesIO()
            drawn.picture(scene).save(png, "PNG", compress_level=1)
            name, image = scene.name, png.getvalue()
            if "caption" in self.tasks:
                yield records.caption_unit(
                    name, name, image, list(drawn.captions(scene)), CAPTION_PROMPT, grouped=grouped
                )
            if "vqa" in self.tasks:
                asked = [
                    Asked(name, f"{name}-{i}", one.question, one.answers[0], list(one.answers), *one[2:])
                    for i, one in enumerate(drawn.questions(scene))
                ]
                yield from records.vqa_units(name, image, asked, grouped=grouped)
            if "chat" in self.tasks:
                turns = drawn.dialogue(scene)
                messages = records.messages_of((turn.question, turn.answer) for turn in turns)
                yield records.chat_unit(name, name, [image], messages, [turn.refers_back for turn in turns])


@dataclass(frozen=True, kw_only=True)
class EasyVqa(Entry):
    """The PyPI package easy-vqa; `fit` and `held_out` (a fixed tenth) are the official train pictures."""

    split: str = "train"
    questions: str = "all"

    CHOICES = {"split": ("train", "fit", "held_out", "test"), "questions": ("all", "what")}

    @cached_property
    def data(self) -> Path:
        spec = importlib.util.find_spec("easy_vqa")
        if spec is None:
            raise ImportError(f"{self.place}: the package easy-vqa is missing; install it: pip install easy-vqa==1.0")
        return Path(spec.origin).parent / "data" / ("test" if self.split == "test" else "train")

    def versions(self) -> list[Any]:
        return [str(self.data), records.mark(self.data / "questions.json")]

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        pictures = defaultdict(list)
        for number, (question, answer, image) in enumerate(records.read_json(self.data / "questions.json")):
            wanted = {"fit": image % 10 != 0, "held_out": image % 10 == 0}.get(self.split, True)
            if wanted and (self.questions == "all" or question.startswith("what")):
                kind = "yes/no" if answer in ("yes", "no") else "color" if "color" in question else "shape"
                id = f"easy-vqa-{self.data.name}-{number}"
                opening = " ".join(question.split()[:2])
                place = f"{self.data / 'questions.json'}: row {number}"
                pictures[image].append(Asked(place, id, question, answer, [answer] * 10, opening, kind))
        for image, asked in pictures.items():
            path = self.data / "images" / f"{image}.png"
            yield from records.vqa_units(f"easy-vqa-{self.data.name}-picture-{image}", path, asked, grouped=grouped)


@dataclass(frozen=True, kw_only=True)
class CocoCaptions(Entry):
    """Captions in COCO's form: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}."""

    annotations: Path
    images: Path
    prompt: str = CAPTION_PROMPT

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        names, references = {}, defaultdict(list)
        for place, row in listed(self.annotations, "images"):
            with rows.row(place):
                names[need(row, "id", int | str)] = (place, need(row, "file_name"))
        for place, row in listed(self.annotations, "annotations"):
            with rows.row(place):
                image = need(row, "image_id", int | str)
                if image not in names:
                    raise RowError(f"image_id {image} is not among the file's 'images'; add the image there")
                references[image].append(need(row, "caption").strip())
        for image, (place, name) in names.items():
            with rows.row(place):
                if image not in references:
                    raise RowError(f"image {image} has no caption; add one, or take the image out")
            if image in references:
                path = self.images / name
                yield records.caption_unit(place, image, path, references[image], self.prompt, grouped=grouped)


@dataclass(frozen=True, kw_only=True)
class VqaV2(Entry):
    """Questions and annotations in VQAv2's form, over a folder of pictures named by their COCO id."""

    questions: Path
    annotations: Path
    images: Path

    def versions(self) -> list[Any]:
        return [*super().versions(), records.mark(self.images)]  # the folder says which name an id has

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        annotated = {}
        for place, row in listed(self.annotations, "annotations"):
            with rows.row(place):
                answers = records.answers_in(row.get("answers"))
                main = row.get("multiple_choice_answer") or records.most_common(answers)
                types = (row.get("question_type"), row.get("answer_type"))
                annotated[need(row, "question_id", int | str)] = (main, answers, *types)
        pictures = defaultdict(list)
        for place, row in listed(self.questions, "questions"):
            with rows.row(place):
                id, image = need(row, "question_id", int | str), need(row, "image_id", int)
                if id not in annotated:
                    raise RowError(f"question_id {id} has no answer in {self.annotations}; add one there")
                pictures[image].append(Asked(place, str(id), need(row, "question"), *annotated[id]))
        numbered = ((re.search(r"\d+$", path.stem), path) for path in self.images.iterdir())
        paths = {int(number[0]): path for number, path in numbered if number}
        for image, asked in pictures.items():
            path = paths.get(image, self.images / f"COCO_*_{image:012d}.jpg")
            yield from records.vqa_units(image, path, asked, grouped=grouped)


@dataclass(frozen=True, kw_only=True)
class Chat(Entry):
    """A file of JSON lines {"id"?, "images": [paths], "messages": [{role, content}], "refers_back"?: [bool]}."""

    path: Path
    images: Path

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n"), 1):
            place = f"{self.path}: line {number}"
            with rows.row(place):
                if line.strip():
                    row = records.parsed(line)
                    names = need(row, "images", list) if row.get("images") else []
                    images = [self.images / str(name) for name in names]
                    id = row.get("id", f"{self.path.stem}-{number}")
                    yield records.chat_unit(place, id, images, row.get("messages"), row.get("refers_back"))


@dataclass(frozen=True, kw_only=True)
class Hub(Entry):
    """Anything that `datasets.load_dataset` reads: a Hub id, a local parquet, csv or json file, a folder of pictures.

    `columns` maps our names (image or images, question, answer or answers, caption or captions, messages, id,
    question_type, answer_type) to the data set's; without it, columns that bear our names are taken.
    """

    path: str
    name: str | None = None
    split: str = "train"
    streaming: bool = False
    columns: dict | None = None
    data_files: str | list | None = None
    task: str | None = None

    CHOICES = {"task": TASKS}
    COLUMNS: ClassVar = ("image", "images", "question", "answer", "answers", "caption", "captions", "messages", "id",
                         "question_type", "answer_type")  # fmt: skip
    BUILDERS: ClassVar = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

    @cached_property
    def data(self) -> Dataset | IterableDataset:
        """The data set, its pictures left encoded."""
        local, path, files = self.folder / self.path, self.path, self.data_files
        if local.is_file() and local.suffix in self.BUILDERS:
            path, files = self.BUILDERS[local.suffix], str(local)
        elif local.exists():
            path = str(local)
        elif local.suffix in self.BUILDERS or path.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{self.place}: {local} does not exist; paths are relative to the mixture file")
        elif path in {*self.BUILDERS.values(), "imagefolder"}:
            files = _resolved(files, self.folder)
        data = datasets.load_dataset(path, self.name, split=self.split, data_files=files, streaming=self.streaming)
        if self.size is not None:
            data = data.take(self.size) if self.streaming else data.shuffle(self.seed).take(min(self.size, len(data)))
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return data

    @cached_property
    def mapping(self) -> dict[str, str]:
        """Our names of the columns to use, with the data set's."""
        present = self.data.column_names or list(next(iter(self.data)))
        mapping = {name: name for name in self.COLUMNS if name in present} if self.columns is None else self.columns
        for ours, theirs in mapping.items():
            check_known(f"{self.place}: columns", ours, self.COLUMNS)
            check_known(f"{self.place}: columns: {ours}", theirs, present)
        taught = {task for column, task in records.LEARNED.items() if column in mapping}
        if not taught or (self.task and self.task not in taught):
            known = f"{', '.join(records.LEARNED)}; the data set has {', '.join(present)}"
            raise ValueError(f"{self.place}: no column to learn from; map one with `columns` to one of {known}")
        return mapping

    def versions(self) -> list[Any]:
        return [self.folder, self.data._fingerprint, self.mapping]

    def chosen(self, units: Iterator[Unit]) -> Iterable[Unit]:
        return units  # `data` chose already: rows may hold encoded pictures, too many to list

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        for number, row in enumerate(self.data):
            yield from self._row_units(number, row, rows, grouped=grouped)

    def _row_units(self, number: int, row: dict[str, Any], rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        place = f"{self.place}: {self.path}: row {number}"
        root = self.folder / self.path
        found = {"id": f"{root.stem}-{number}"} | {ours: row[theirs] for ours, theirs in self.mapping.items()}
        with rows.row(place):
            folder = root if root.is_dir() else root.parent if root.is_file() else self.folder
            yield from records.row_units(place, found, self.task, folder, CAPTION_PROMPT, grouped=grouped)

    def stream(self, *, grouped: bool, skip: bool) -> IterableDataset:
        """Give the records of a stream, made when they are asked for."""
        columns = self.data.column_names or list(next(iter(self.data)))
        batches = {"batched": True, "batch_size": 16, "with_indices": True, "remove_columns": columns}
        made = {"grouped": grouped, "skip": skip}
        return self.data.map(self._batch, **batches, fn_kwargs=made, features=FEATURES)

    def _batch(self, batch: dict[str, list], numbers: list[int], *, grouped: bool, skip: bool) -> dict[str, list]:
        rows, made = Rows(skip=skip), []
        for number, *values in zip(numbers, *batch.values()):
            units = self._row_units(number, dict(zip(batch, values)), rows, grouped=grouped)
            made += records.records_of(units, rows)
        for message in rows.skipped:
            logger.warning("left out %s", message)
        # A stream that has been mapped is not decoded by `datasets`, unlike a stored set.
        made = [record | {"images": [records.decoded(image) for image in record["images"]]} for record in made]
        return {column: [record[column] for record in made] for column in FEATURES}


SOURCES: dict[str, type[Entry]] = {
    "scenes": Scenes,
    "easy_vqa": EasyVqa,
    "coco_captions": CocoCaptions,
    "vqav2": VqaV2,
    "chat": Chat,
    "hub": Hub,
}


def mixture_parts(path: str | Path) -> list[str]:
    """Give the parts that a mixture file has."""
    return list(_mixture(Path(path)))


def load_mixture(
    path: str | Path, part: str, *, grouped: bool, skip_bad_rows: bool = False
) -> Dataset | IterableDataset:
    """Give the records of one part of a mixture file; an IterableDataset if any of its sources streams.

    Args:
        path: The YAML file.
        part: "train", "eval" or "test"; a file without "test" gives its "eval".
        grouped: For training: all questions (or captions) of a picture are turns of one record. Otherwise, for scoring:
            one record a question (or captioned picture), with its `answers` (or `references`).
        skip_bad_rows: Leave out rows that cannot be used and log how many, instead of raising.

    Raises:
        ValueError: For an unknown key, a value out of bounds, a bad row: each names its place and the way out.
        FileNotFoundError: For a file, folder or picture that is not there.
        ImportError: For a source whose package is not installed.
    """
    path = Path(path)
    mixture = _mixture(path)
    part = "eval" if part == "test" and "test" not in mixture else part
    if part not in mixture:
        raise ValueError(f"{path}: has no part {part!r}; it has {', '.join(mixture)}")
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
    parts = [one.to_iterable_dataset() if isinstance(one, Dataset) else one for one in parts]
    if part != "train" or len(parts) == 1:
        return datasets.concatenate_datasets(parts)
    total = sum(entry.weight for entry in entries)
    # A stream has no length: weights are the shares in which the sources are drawn, short ones again and again.
    shares = [entry.weight / total for entry in entries]
    return datasets.interleave_datasets(parts, shares, seed=entries[0].seed, stopping_strategy="all_exhausted")


def _stored(entry: Entry, *, grouped: bool, skip: bool) -> Dataset:
    code = [Path(file).read_text() for file in (__file__, drawn.__file__)]
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
            values[key] = records.value_of(f"{place}: {key}", value, known[key].type, folder, kind.CHOICES.get(key))
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


def _resolved(files: Any, folder: Path) -> Any:
    if isinstance(files, list):
        return [_resolved(one, folder) for one in files]
    return files if files is None or "://" in files else str(folder / files)
