# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Records: the one form that every picture-text source takes, how it is stored, and where a bad row ends."""

import difflib
import hashlib
import io
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import datasets
import yaml
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from .processing_moevlm import IMAGE_TOKEN

FEATURES = Features(
    {
        "images": List(datasets.Image()),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "references": List(Value("string")),
        "answers": List(Value("string")),
        "id": Value("string"),
        "task": Value("string"),
        "question_type": Value("string"),
        "answer_type": Value("string"),
        "refers_back": List(Value("bool")),
    }
)

logger = logging.getLogger(__name__)


class RowError(ValueError):
    """A row that cannot be used; the message says why and what to do."""


class MissingPictureError(RowError):
    """A row whose picture is not there."""


class Unit(NamedTuple):
    """A record before its pictures are looked at, and the place it comes from."""

    place: str
    pictures: list[Any]
    fields: dict[str, Any]


class Rows:
    """Where bad rows end: the first is raised with its place or, if skipping, all are noted."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.skipped: list[str] = []
        self.pictures: dict[str, list[int] | None] = {}  # the files looked at, as they were then
        self.unusable: dict[str, RowError] = {}  # what is wrong with some of them

    @contextmanager
    def row(self, place: str) -> Iterator[None]:
        """Look after one row: a RowError in the block ends here."""
        try:
            yield
        except RowError as error:
            if not self.skip:
                kind = FileNotFoundError if isinstance(error, MissingPictureError) else ValueError
                raise kind(f"{place}: {error}; or leave such rows out with skip_bad_rows") from None
            self.skipped.append(f"{place}: {error}")

    def record(self, unit: Unit) -> dict[str, Any]:
        """Check a unit's texts and pictures, and give its record."""
        parts = [part for message in unit.fields["messages"] for part in message["content"]]
        if any(IMAGE_TOKEN in part.get("text", "") for part in parts):
            raise RowError(f"has {IMAGE_TOKEN} in a text, where no picture can stand; take it out")
        return dict.fromkeys(FEATURES) | unit.fields | {"images": [self._picture(value) for value in unit.pictures]}

    def _picture(self, value: Any) -> Any:
        """Give a path, encoded bytes or a PIL picture as `datasets` wants it, after a look inside."""
        if isinstance(value, bytes):  # drawn here: nothing to look for
            return {"bytes": value, "path": None}
        if isinstance(value, dict):
            value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
        if isinstance(value, Image.Image) or "://" in str(value):  # already decoded, or in a store to stream from
            return value
        if isinstance(value, io.BytesIO):
            _look_inside(value)
            return {"bytes": value.getvalue(), "path": None}
        if not isinstance(value, str | Path):
            raise RowError(f"has no picture ({value!r}); give the row one")
        if (name := str(value)) not in self.pictures:
            self.pictures[name] = mark(Path(value))
            try:
                _look_inside(Path(value))
            except RowError as error:
                self.unusable[name] = error
        if name in self.unusable:
            raise self.unusable[name]
        return name


def mark(path: Path) -> list[int] | None:
    """Give what changes when a file does; None while there is no file."""
    status = path.stat() if path.exists() else None
    return [status.st_size, status.st_mtime_ns] if status else None


def _look_inside(file: Path | io.BytesIO) -> None:
    name = "its picture" if isinstance(file, io.BytesIO) else f"the picture {file}"
    try:
        with Image.open(file) as image:
            image.draft("RGB", (1, 1))  # JPEG: decoded at an eighth of the size
            image.load()  # opening alone does not find a truncated file
    except FileNotFoundError:
        raise MissingPictureError(f"{name} does not exist; correct the row or the entry's folder") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a whole picture" if isinstance(file, io.BytesIO) else error
        raise RowError(f"{name} does not open ({reason}); replace it") from None


def decoded(image: Any) -> Image.Image:
    """Give the picture that `datasets` would decode from a record's image."""
    feature = datasets.Image()
    return image if isinstance(image, Image.Image) else feature.decode_example(feature.encode_example(image))


def need(row: Any, key: str, kind: type = str) -> Any:
    """Give a row's value, which must be of the kind and not empty."""
    value = row.get(key) if isinstance(row, dict) else None
    empty = value == [] or (isinstance(value, str) and not value.strip())
    if empty or isinstance(value, bool) or not isinstance(value, kind):
        raise RowError(f"{key!r} is {value!r}; give the row a usable {key!r}")
    return value


def _message(role: str, text: str, *, pictures: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def messages_of(pairs: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Make questions and answers on one picture, which stands before the first question, a list of messages."""
    turns = []
    for question, answer in pairs:
        turns += [_message("user", question, pictures=0 if turns else 1), _message("assistant", answer)]
    return turns


class Asked(NamedTuple):
    """A question; `answers` are what it is scored with, `main` is what is learned."""

    place: str
    id: str
    question: str
    main: str
    answers: list[str]
    question_type: str | None = None
    answer_type: str | None = None


def vqa_units(id: Any, image: Any, asked: list[Asked], *, grouped: bool) -> Iterator[Unit]:
    """Give one unit of all questions on a picture, or one of each."""
    if grouped:
        messages = messages_of((one.question, one.main) for one in asked)
        yield Unit(asked[0].place, [image], {"id": str(id), "task": "vqa", "messages": messages})
        return
    for one in asked:
        scored = {key: getattr(one, key) for key in ("id", "answers", "question_type", "answer_type")}
        yield Unit(one.place, [image], {"task": "vqa", "messages": messages_of([(one.question, one.main)])} | scored)


def caption_unit(place: str, id: Any, image: Any, references: list[str], prompt: str, *, grouped: bool) -> Unit:
    """Give a unit that teaches all captions of a picture, or one that is scored with all."""
    messages = messages_of((prompt, reference) for reference in references[: None if grouped else 1])
    shown = None if grouped else references
    return Unit(place, [image], {"id": str(id), "task": "caption", "messages": messages, "references": shown})


def chat_unit(place: str, id: Any, images: list[Any], messages: Any, refers_back: Any = None) -> Unit:
    """Check a dialogue whose contents are strings with <image> markers or lists of images and texts."""
    if not isinstance(messages, list) or not messages:
        raise RowError("has no list 'messages'; give it [{'role': 'user', 'content': …}, {'role': 'assistant', …}]")
    parsed = [{"role": need(message, "role"), "content": _content(message)} for message in messages]
    roles = [message["role"] for message in parsed]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise RowError(
            f"has the roles {roles}; write user and assistant in turn (after an optional system), answer last"
        )
    if any(part["type"] == "image" for message in parsed for part in message["content"] if message["role"] != "user"):
        raise RowError("has a picture outside the user's turns; move it into the question before")
    shown = sum(part["type"] == "image" for message in parsed for part in message["content"])
    if shown != len(images):
        raise RowError(f"has {len(images)} images but {shown} <image> markers; write one marker for each image")
    answers = roles.count("assistant")
    if refers_back is not None and (not isinstance(refers_back, list) or len(refers_back) != answers):
        raise RowError(f"has {answers} answers but 'refers_back' is {refers_back!r}; give one true or false for each")
    return Unit(place, images, {"id": str(id), "task": "chat", "messages": parsed, "refers_back": refers_back})


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        parts = [part.strip() for part in re.split(f"({IMAGE_TOKEN})", content)]
        content = [{"type": "image"} if p == IMAGE_TOKEN else {"type": "text", "text": p} for p in parts if p]
    if not isinstance(content, list) or not content:
        raise RowError(f"has a message with the content {message.get('content')!r}; write a text there")
    for part in content:
        if need(part, "type") == "text":
            need(part, "text")
        elif part["type"] != "image":
            raise RowError(f"has a part of type {part['type']!r}; only 'image' and 'text' are known")
    return [{key: part[key] for key in ("type", "text") if part.get(key) is not None} for part in content]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every source knows: at most `size` records, drawn by `seed`; in training seen `weight` times, each time with
    pictures moved by up to `shift` pixels, those of a lower `stage` first in the first epoch."""

    folder: Path
    place: str
    size: int | None = None
    seed: int = 0
    weight: float = 1.0
    stage: int = 1
    shift: int = 0

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}

    def versions(self) -> list[Any]:
        """Give what changes when the source does, its pictures aside."""
        paths = [getattr(self, one.name) for one in fields(self) if one.type is Path]
        return [mark(path) for path in paths if path.is_file()]

    def units(self, rows: Rows, *, grouped: bool) -> Iterator[Unit]:
        """Give all units; rows that cannot be one end in `rows`."""
        raise NotImplementedError

    def chosen_units(self, rows: Rows, *, grouped: bool) -> Iterable[Unit]:
        """Give the units to store."""
        return self.chosen(self.units(rows, grouped=grouped))

    def chosen(self, units: Iterator[Unit]) -> Iterable[Unit]:
        """Draw `size` units by the seed."""
        if self.size is None:
            return units
        units = list(units)
        return units if self.size >= len(units) else random.Random(self.seed).sample(units, self.size)


def check_known(place: str, name: Any, known: Iterable[Any]) -> None:
    """Raise for a name that is not known, with the known ones and a guess."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{place}: unknown {name!r}{guess}; known: {', '.join(known)}")


def parsed(line: str) -> dict[str, Any]:
    """Give the object that a JSON line holds."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"is not valid JSON ({error}); write one object a line") from None
    if not isinstance(row, dict):
        raise RowError(f"holds {row!r}; write one object a line")
    return row


def list_in(cell: Any) -> Any:
    """Give the list that a cell of a table holds as text, in JSON's form or Python's; any other value as it is."""
    if not isinstance(cell, str) or not re.match(r"\[\s*['\"{]", cell):
        return cell
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError:
        raise RowError(f"has {cell!r}, which begins like a list and is none; write it as JSON") from None


def read_text(path: Path) -> str:
    """Give what a text file holds."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error}); save it as such") from None


def read_json(path: Path) -> Any:
    """Give what a JSON file holds."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}); write it again") from None


def listed(path: Path, key: str) -> list[tuple[str, Any]]:
    """Give the places and rows of a list in a JSON file."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path}: has no list {key!r}; give a file of the form {{{key!r}: […]}}")
    return [(f"{path}: {key}[{number}]", row) for number, row in enumerate(content[key])]


def records_of(units: Iterable[Unit], rows: Rows) -> Iterator[dict[str, Any]]:
    """Give the records of the units whose pictures open."""
    for unit in units:
        record = None
        with rows.row(unit.place):
            record = rows.record(unit)
        if record is not None:
            yield record


def store(generate: Callable[[Rows], Iterable[Unit]], place: str, version: Any, *, skip: bool) -> Dataset:
    """Build the records of a source once, and again when `version`, a picture or this code changes.

    Args:
        generate: Gives the units, and reports the bad rows it meets.
        place: The name of the source in messages.
        version: Anything with a `repr` that changes when the units do.
        skip: Leave bad rows out and log them, instead of raising.
    """
    stamp = _digest(Path(__file__).read_text(), datasets.__version__, version, skip)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "moevlm"
    while (report := folder / f"{stamp}.json").exists():
        pictures = _load(report)["pictures"]
        if not (changed := {path: now for path, seen in pictures.items() if (now := mark(Path(path))) != seen}):
            break
        stamp = _digest(stamp, changed)
    arguments = {"generate": generate, "place": place, "skip": skip, "report": report}
    try:
        dataset = Dataset.from_generator(_stored_records, features=FEATURES, gen_kwargs=arguments, fingerprint=stamp)
    except DatasetGenerationError as error:
        # `datasets` hides what a row's error says behind one that says nothing.
        if isinstance(error.__cause__, ValueError | OSError):
            raise error.__cause__ from None
        raise
    if skipped := _load(report)["skipped"]:
        logger.warning("%s: left out %d bad rows:\n  %s", place, len(skipped), "\n  ".join(skipped[:10]))
    return dataset


def _stored_records(generate: Callable, place: str, skip: bool, report: Path) -> Iterator[dict[str, Any]]:
    rows, empty = Rows(skip=skip), True
    for record in records_of(generate(rows), rows):
        empty = False
        yield record
    if empty:
        raise ValueError(f"{place}: gives no usable record{': ' if rows.skipped else ''}{'; '.join(rows.skipped[:1])}")
    report.parent.mkdir(parents=True, exist_ok=True)
    draft = report.with_suffix(f".{os.getpid()}")  # another process may be reading
    draft.write_text(json.dumps({"skipped": rows.skipped, "pictures": rows.pictures}))
    draft.replace(report)


def _load(report: Path) -> dict[str, Any]:
    return json.loads(report.read_text()) if report.exists() else {"skipped": [], "pictures": {}}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
