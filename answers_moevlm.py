# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Answers on disk: on their way, so that a killed run can go on; as finished files; and what is wrong with them."""

import json
import logging
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .records_moevlm import read_json

PARTIAL = "partial"
SHOWN = 5

# Column ("model", "blind", …), task and id of an answer.
Key = tuple[str, str, str]


class Problem(NamedTuple):
    """Something wrong with the input: what, and the samples that it concerns."""

    what: str
    ids: list[str]

    def __str__(self) -> str:
        more = f" and {len(self.ids) - SHOWN} more" if len(self.ids) > SHOWN else ""
        return f"{len(self.ids)} {self.what}: {', '.join(self.ids[:SHOWN])}{more}"


def settle(problems: Sequence[Problem], *, skip: bool) -> None:
    """Raise for the problems whose samples cannot be scored, unless they may be left out.

    Raises:
        ValueError: Names and counts them.
    """
    if problems and not skip:
        raise ValueError(f"{'; '.join(map(str, problems))}; correct the data, or leave these out with --skip_bad_rows")


def checked(samples: Sequence[Any]) -> tuple[list[Any], list[Problem]]:
    """The samples that can be scored, and what is wrong with the others: a repeated id, an empty reference."""
    kept: dict[tuple[str, str], Any] = {}
    twice, empty = [], []
    for sample in samples:
        key = sample.task, sample.id
        texts = [sample.target, *sample.references]  # of ten annotators one may have left a question unanswered
        if key in kept:
            twice.append(f"{sample.task} {sample.id}")
        elif not all(text.strip() for text in texts):
            empty.append(f"{sample.task} {sample.id}")
        else:
            kept[key] = sample
    found = [Problem("duplicate ids", twice), Problem("samples with an empty reference", empty)]
    return list(kept.values()), [problem for problem in found if problem.ids]


def empty_answers(samples: Sequence[Any], answers: Sequence[str]) -> list[Problem]:
    """The answers that say nothing: they are scored like any other, and worth a look."""
    ids = [f"{one.task} {one.id}" for one, answer in zip(samples, answers, strict=True) if not answer.strip()]
    return [Problem("empty answers", ids)] if ids else []


@contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """What a logger and those below it warn about meanwhile, such as rows that are left out."""
    messages: list[str] = []

    def emit(record: logging.LogRecord) -> None:
        messages.append(record.getMessage())
        # With a handler of its own a logger falls silent, unless the program set up logging.
        if not logging.getLogger().handlers:
            print(record.getMessage(), file=sys.stderr)

    handler = logging.Handler(logging.WARNING)
    handler.emit = emit
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


def start(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> dict[Key, str]:
    """Prepare `folder/partial` on the main process; gives the answers that an interrupted run left there.

    Without `resume` those are put aside into `folder/partial-old`.

    Raises:
        ValueError: The interrupted run had other settings, so its answers would not be those of this run.
    """
    partial = folder / PARTIAL
    note = partial / "settings.json"
    if note.exists() and not resume:
        shutil.rmtree(folder / f"{PARTIAL}-old", ignore_errors=True)
        partial.rename(folder / f"{PARTIAL}-old")
    if not note.exists():
        partial.mkdir(parents=True, exist_ok=True)
        replace(note, lambda path: path.write_text(json.dumps(settings), encoding="utf-8"))
        return {}
    before = json.loads(note.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    if changed := sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key)):
        shown = ", ".join(f"{key}={now.get(key)!r} (was {before.get(key)!r})" for key in changed)
        raise ValueError(
            f"resume: {partial} holds answers of another run: {shown}; repeat its settings, or drop --resume"
        )
    known: dict[Key, str] = {}
    for path in sorted(partial.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # cut off by the kill: that batch is answered again
                continue
            known |= {(row["column"], row["task"], id): answer for id, answer in zip(row["ids"], row["answers"])}
    return known


class Journal:
    """Appends one process's answers to a file of its own, a line for each batch, each on the disk before the next."""

    def __init__(self, folder: Path, rank: int):
        partial = folder / PARTIAL
        partial.mkdir(parents=True, exist_ok=True)
        # A new file for each start: after a kill the last line of the old one may be half a line.
        number = len(list(partial.glob(f"answers-{rank}-*.jsonl")))
        self.file = open(partial / f"answers-{rank}-{number}.jsonl", "x", encoding="utf-8")

    def add(self, column: str, samples: Sequence[Any], places: Sequence[int], answers: Sequence[str]) -> None:
        """Append the answers to the samples at these places, which are of one task."""
        ids = [samples[place].id for place in places]
        row = {"column": column, "task": samples[places[0]].task, "ids": ids, "answers": list(answers)}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def places_of(known: Mapping[Key, str], column: str, samples: Sequence[Any]) -> dict[int, str]:
    """The known answers of a column by the places of its samples."""
    keys = [(column, sample.task, sample.id) for sample in samples]
    return {place: known[key] for place, key in enumerate(keys) if key in known}


def settings_of(args: Any, tasks: Sequence[Any], samples: Sequence[Any]) -> dict[str, Any]:
    """What answers depend on; answers of runs that differ in one of these must not be mixed."""
    names = ("model_name_or_path", "batch_size", "num_shots", "max_new_tokens", "seed", "dtype")
    files = {path.name: path.stat() for path in sorted(Path(args.model_name_or_path).glob("*.*")) if path.is_file()}
    asked = repr([(sample.task, sample.id, sample.prompt, sample.version) for sample in samples])
    told = {name: getattr(args, name) for name in names} | {
        "limits": {task.name: task.max_new_tokens for task in tasks},
        "samples": f"{len(samples)} with digest {zlib.crc32(asked.encode()):08x}",
    }
    return told | {f"file {name}": [status.st_size, status.st_mtime_ns] for name, status in files.items()}


def finish(folder: Path) -> None:
    """Drop the partial answers, once all stand in their files."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def form(sample: Any) -> tuple[str, str]:
    """Keys of an answer's id and text: COCO results, VQA server form, and the like for dialogues."""
    if sample.metric == "CIDEr":
        return "image_id", "caption"
    return ("question_id" if sample.turn is None else "turn_id"), "answer"


def read_answers(path: Path, samples: Sequence[Any]) -> tuple[dict[tuple[str, str], str], list[Problem]]:
    """Answers of any program for these samples, by task and id, and what does not fit.

    Args:
        path: A file in COCO's result form, the VQA server's form or ours for dialogues, or a folder of
            `predictions_<task>.json`. A file is of the task in its name; one given by itself may have another name,
            and is then of the only task with its keys.

    Raises:
        ValueError: A file that is not a list of such rows, or of no task, or no answer to any of the samples.
    """
    files = sorted(path.glob("predictions_*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"predictions={path}: no such file, nor a folder with predictions_<task>.json; check the path")
    known = {(sample.task, sample.id) for sample in samples}
    named = {f"predictions_{task}.json" for task, _ in known}
    others = [file for file in files if path.is_dir() and file.name not in named]
    answers: dict[tuple[str, str], str] = {}
    twice, strange = [], []
    for file in [each for each in files if each not in others]:
        for key, answer in _rows(file, samples):
            if key not in known:
                strange.append(" ".join(key))
            elif key in answers:
                twice.append(" ".join(key))
            else:
                answers[key] = answer
    missing = [f"{sample.task} {sample.id}" for sample in samples if (sample.task, sample.id) not in answers]
    found = [
        Problem("files of no asked task", [file.name for file in others]),
        Problem("predictions without references", strange),
        Problem("duplicate predictions", twice),
        Problem("samples without a prediction", missing),
    ]
    found = [problem for problem in found if problem.ids]
    if not answers:
        raise ValueError(f"predictions={path}: no row answers any of the samples ({'; '.join(map(str, found))})")
    return answers, found


def _rows(file: Path, samples: Sequence[Any]) -> Iterator[tuple[tuple[str, str], str]]:
    rows = read_json(file)
    forms = {sample.task: form(sample) for sample in samples}
    task = file.stem.removeprefix("predictions_")
    if task not in forms:
        keys = set(rows[0]) if isinstance(rows, list) and rows and isinstance(rows[0], dict) else set()
        fitting = [name for name, each in forms.items() if set(each) <= keys]
        if len(fitting) != 1:
            raise ValueError(
                f"{file}: is of no task of this data ({', '.join(forms)}); name it predictions_<task>.json, with rows "
                "{image_id, caption}, {question_id, answer} or {turn_id, answer}"
            )
        task = fitting[0]
    id_key, text_key = forms[task]
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or id_key not in row or not isinstance(row.get(text_key), str):
            raise ValueError(f"{file}: row {number} is {row!r}; give it {id_key!r} and a text {text_key!r}")
        yield (task, str(row[id_key])), row[text_key]


def write(folder: Path, samples: Sequence[Any], details: Sequence[Mapping[str, Any]], results: Any) -> None:
    """Leave metrics.json, predictions_<task>.json and samples.jsonl, each whole or not at all.

    Args:
        details: What samples.jsonl holds, one for each sample.
        results: What metrics.json holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for sample, told in zip(samples, details, strict=True):
        key, value = form(sample)
        # The official files count in integers; other ids stay as they are, 007 too.
        number = int(sample.id) if sample.id.isdecimal() else None
        row = {key: number if str(number) == sample.id else sample.id, value: told["prediction"]}
        contents.setdefault(f"predictions_{sample.task}.json", []).append(row)
    results_before = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    for name in {f"predictions_{task}.json" for task in results_before} - set(contents):
        (folder / name).unlink(missing_ok=True)
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in details)
    replace(folder / "samples.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    for name, content in (contents | {"metrics.json": results}).items():
        write_json(folder / name, content)


def detail(sample: Any, answer: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about one answer that reports and comparisons need, as JSON can hold it."""
    votes = Counter(sample.answers).most_common() if sample.answers else []
    told = {"task": sample.task, "id": sample.id, "metric": sample.metric, "question": sample.question}
    told |= {"prediction": answer, "target": sample.target, "references": list(sample.references), "answers": votes}
    kinds = {name: getattr(sample, name) for name in ("question_type", "answer_type", "turn")}
    return told | {name: kind for name, kind in kinds.items() if kind is not None} | {"scores": dict(scores)}


def idf_table(path: Path, train: Sequence[Any], make: Callable[[Sequence[Sequence[str]]], dict]) -> dict[str, Any]:
    """CIDEr's table of document frequencies: the file's, or made of the train part's captions and stored there.

    Args:
        make: Makes a table of lists of captions: the metric's `document_frequencies`.

    Raises:
        ValueError: There is neither such a file nor a caption to make it of, or the file is not JSON.
    """
    if path.exists():
        return read_json(path)
    captions = [list(sample.references) for sample in train if sample.metric == "CIDEr" and sample.references]
    if not captions:
        raise ValueError(f"idf={path} does not exist, and the train part has no captions to make it of; add some there")
    table = make(captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, lambda draft: draft.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8"))
    return table


def read_details(path: Path) -> list[dict[str, Any]]:
    """The answers and scores of a finished run: of its folder, or of one of its `predictions_<task>.json`.

    Each answer's `rules` are those that its scores depend on: "idf" (see `evaluation_moevlm.score`) and "normalize".

    Raises:
        FileNotFoundError: There is no samples.jsonl or metrics.json.
    """
    folder, task = (path, None) if path.is_dir() else (path.parent, path.stem.removeprefix("predictions_"))
    for name in ("samples.jsonl", "metrics.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{path}: no {name} beside it; score it first: run_eval.py --predictions {path} --output_dir …"
            )
    results = read_json(folder / "metrics.json")
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for row in map(json.loads, filter(None, lines)) if task in (None, row["task"])]
    return [row | {"rules": {name: results[row["task"]].get(name) for name in ("idf", "normalize")}} for row in rows]


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON that people can read, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    replace(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def replace(path: Path, save: Callable[[Path], Any]) -> None:
    """Put a file in its place when it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(temporary)
    os.replace(temporary, path)
