# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Sources: packages, files and the Hub, each an entry of a mixture that gives units of the record form.

The keys of an entry are the fields of its class; paths are relative to the mixture file.
"""

import importlib.util
import io
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError

from . import records_moevlm as records
from . import scenes_moevlm as drawn
from .dialogues_moevlm import dialogue
from .records_moevlm import FEATURES, Asked, Entry, RowError, Rows, Unit, check_known, listed, need

TASKS = ("caption", "vqa", "chat")
CAPTION_PROMPT = "Describe the picture."
# What a column of a table teaches, in the order in which a table with several is read.
LEARNED = {"messages": "chat", "answers": "vqa", "answer": "vqa", "captions": "caption", "caption": "caption"}
LISTS = ("messages", "answers", "captions", "images")

logger = logging.getLogger(__name__)


def written(value: Any) -> str:
    """Give a value of a table as its author wrote it: one blank cell makes 3.0 of every 3 in a column."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def answers_in(value: Any) -> list[str]:
    """Give the texts of an answer, of a list of answers (empty ones are padding), or of VQAv2's list of {"answer"}."""
    values = value if isinstance(value, list) else [value]
    texts = [one.get("answer") if isinstance(one, dict) else one for one in values]
    texts = [written(text) for text in texts if isinstance(text, str | int | float)]
    if not any(texts):
        raise RowError(f"has no answer ({value!r}); give it one")
    return [text for text in texts if text or isinstance(values[0], dict)]  # VQAv2: an annotator without an answer


def most_common(texts: list[str]) -> str:
    """Give the most frequent text that is not empty, the first of equals."""
    return Counter(filter(None, texts)).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True)
class Scenes(Entry):
    """Drawn shapes, `max_shapes` at most; `size` counts pictures, each with a caption, questions and a dialogue.

    Two tasks are for training: `lookup` asks short questions about one shape each ([`scenes_moevlm.lookups`]), `place`
    more of the questions about positions and sizes ([`scenes_moevlm.places`]).
    """

    split: str = "train"
    size: int = 1000
    max_shapes: int = drawn.MAX_SHAPES
    tasks: list = TASKS

    CHOICES = {"split": drawn.SPLITS, "tasks": (*TASKS, "lookup", "place")}

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
            for task, questions in (("vqa", drawn.questions), ("lookup", drawn.lookups), ("place", drawn.places)):
                if task in self.tasks and (found := questions(scene)):
                    prefix = name if task == "vqa" else f"{name}-{task}"
                    asked = [
                        Asked(name, f"{prefix}-{i}", one.question, one.answers[0], list(one.answers), *one[2:])
                        for i, one in enumerate(found)
                    ]
                    yield from records.vqa_units(name, image, asked, grouped=grouped)
            if "chat" in self.tasks:
                turns = dialogue(scene)
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
                image = need(row, "id", int | str)
                if image in names:
                    raise RowError(f"image {image} stands twice among the file's 'images'; give each image one row")
                names[image] = (place, need(row, "file_name"))
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
                answers = answers_in(row.get("answers"))
                main = row.get("multiple_choice_answer") or most_common(answers)
                types = (row.get("question_type"), row.get("answer_type"))
                id = need(row, "question_id", int | str)
                if id in annotated:
                    raise RowError(f"question_id {id} stands twice among the 'annotations'; give each question one row")
                annotated[id] = (main, answers, *types)
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
    """JSON lines {"id"?, "images": [paths] or "image": path, "messages": [{role, content}], "refers_back"?: [bool]}."""

    path: Path
    images: Path

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        for number, line in enumerate(records.read_text(self.path).split("\n"), 1):
            place = f"{self.path}: line {number}"
            with rows.row(place):
                if line.strip():
                    row = records.parsed(line)
                    names = _pictures(row)
                    images = [self.images / str(name) for name in names]
                    id = f"{os.path.relpath(self.path, self.folder)}-{number}" if row.get("id") is None else row["id"]
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
    WITH_FILES: ClassVar = {*BUILDERS.values(), "imagefolder"}  # kinds of files, which `data_files` names

    @classmethod
    def is_local(cls, path: str, folder: Path) -> bool:
        """Whether a path, relative to the folder, means files of one's own, even if gone, and no Hub data set."""
        on_disk = Path(path).suffix in cls.BUILDERS or path.startswith((".", "/", "~")) or (folder / path).exists()
        return on_disk or path in cls.WITH_FILES

    @cached_property
    def data(self) -> Dataset | IterableDataset:
        """The data set, its pictures left encoded."""
        path, files = self._place()
        options = {"split": self.split, "data_files": files, "streaming": self.streaming}
        first = files[0] if isinstance(files, list) else files
        try:
            if path == "csv" and isinstance(first, str) and Path(first).is_file():
                options |= _cells_as_written(first)
            data = datasets.load_dataset(path, self.name, **options)
        except (DatasetGenerationError, UnicodeDecodeError, pandas.errors.EmptyDataError) as error:
            reason = error.__cause__ or error  # a DatasetGenerationError only says that there was one
            raise ValueError(f"{self.place}: {self.path} does not load: {reason}; mend the file") from error
        if self.size is not None:
            data = data.take(self.size) if self.streaming else data.shuffle(self.seed).take(min(self.size, len(data)))
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return data

    def _place(self) -> tuple[str, Any]:
        """What `datasets` is to load, a Hub id, a folder or a kind of file, and the files."""
        local, path, files = self.folder / self.path, self.path, self.data_files
        if files == []:
            raise ValueError(f"{self.place}: data_files is []; name a file in it, or leave it out")
        if local.is_file() and local.suffix not in self.BUILDERS:
            known = ", ".join(self.BUILDERS)
            raise ValueError(f"{self.place}: {local} is of no kind that is read; known are {known}, and folders")
        if local.is_file():
            return self.BUILDERS[local.suffix], str(local)
        if local.exists():
            return str(local), files
        if path in self.WITH_FILES:
            return path, _resolved(files, self.folder)
        if self.is_local(path, self.folder):
            raise FileNotFoundError(f"{self.place}: {local} does not exist; paths are relative to the mixture file")
        return path, files

    @cached_property
    def present(self) -> list[str]:
        """The data set's columns; a stream that does not name them shows them in its first row."""
        return self.data.column_names or list(next(iter(self.data)))

    @cached_property
    def mapping(self) -> dict[str, str]:
        """Our names of the columns to use, with the data set's."""
        mapping = self.columns
        if mapping is None:
            mapping = {name: name for name in self.COLUMNS if name in self.present}
        for ours, theirs in mapping.items():
            check_known(f"{self.place}: columns", ours, self.COLUMNS)
            check_known(f"{self.place}: columns: {ours}", theirs, self.present)
        taught = {task for column, task in LEARNED.items() if column in mapping}
        if not taught or (self.task and self.task not in taught):
            known = f"{', '.join(LEARNED)}; the data set has {', '.join(self.present)}"
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
        with rows.row(place):
            named = {ours: row[theirs] for ours, theirs in self.mapping.items()}
            named |= {name: records.list_in(named[name]) for name in LISTS if name in named}
            if (id := named.pop("id", None)) in (None, ""):
                origin = (self.path, self.name, self.data_files, self.split, number)  # no other entry's row has it
                id = "-".join(str(part) for part in origin if part is not None)
            yield from self._named_units(place, written(id), named, grouped=grouped)

    def _named_units(self, place: str, id: str, row: dict[str, Any], *, grouped: bool) -> list[Unit]:
        """Give the units of a row by our names; relative paths of pictures are in the data set's folder."""
        root = self.folder / self.path
        folder = root if root.is_dir() else root.parent if root.is_file() else self.folder
        images = [folder / one if isinstance(one, str) and "://" not in one else one for one in _pictures(row)]
        column = next(name for name, teaches in LEARNED.items() if name in row and self.task in (None, teaches))
        task = LEARNED[column]
        if task == "chat":
            return [records.chat_unit(place, id, images, row["messages"])]
        if len(images) != 1:
            raise RowError(f"has {len(images)} pictures, and a {task} row needs one; give it one")
        texts = answers_in(row[column])
        if task == "caption":
            return [records.caption_unit(place, id, images[0], texts, CAPTION_PROMPT, grouped=grouped)]
        main = row["answer"].strip() if isinstance(row.get("answer"), str) else ""
        main = main or most_common(texts)
        types = (row.get("question_type") or None, row.get("answer_type") or None)
        texts = texts * (10 if len(texts) == 1 else 1)
        asked = Asked(place, id, need(row, "question"), main, texts, *types)
        return list(records.vqa_units(id, images[0], [asked], grouped=grouped))

    def stream(self, *, grouped: bool, skip: bool) -> IterableDataset:
        """Give the records of a stream, made when they are asked for."""
        batches = {"batched": True, "batch_size": 16, "with_indices": True, "remove_columns": self.present}
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


def _pictures(row: dict[str, Any]) -> list[Any]:
    """What a row has under `images`, or else under `image`."""
    if row.get("images"):
        return need(row, "images", list)
    return [row["image"]] if row.get("image") not in (None, "") else []


def _cells_as_written(path: str) -> dict[str, Any]:
    """Options that keep "007", "1.50", "true" and "None" of a CSV file what they are."""
    columns = pandas.read_csv(path, nrows=0).columns  # as `datasets` names them
    return {"features": Features(dict.fromkeys(columns, Value("string"))), "keep_default_na": False}


def _resolved(files: Any, folder: Path) -> Any:
    if isinstance(files, list):
        return [_resolved(one, folder) for one in files]
    return files if files is None or "://" in files else str(folder / files)
