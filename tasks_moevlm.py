# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a model is asked: the flags of a scoring run, tasks as YAML files, worked examples before the question."""

import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

import numpy as np
import torch
import yaml

from .records_moevlm import check_known

FOLDER = Path(__file__).resolve().parent
READS = ("caption", "vqa", "chat")
METRICS = ("CIDEr", "vqa_accuracy", "turn_accuracy")
POOL = 10_000  # train records of a stream, which may have no end
# What metrics.json holds beside the tasks.
TAKEN = ("blind", "text_only", "question_only", "problems", "run", "training")


@dataclass
class EvalArguments:
    model_name_or_path: Optional[str] = field(default=None, metadata={"help": "Folder or Hub id of the checkpoint."})
    predictions: Optional[str] = field(default=None, metadata={"help": "Score these answers instead: file or folder."})
    data: str = field(default=str(FOLDER / "configs/data/default.yaml"), metadata={"help": "Mixture to score on."})
    output_dir: str = field(default="outputs/eval", metadata={"help": "Folder for scores and predictions."})
    part: Literal["test", "eval"] = field(default="test", metadata={"help": "Part of the mixture."})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Of configs/tasks, or YAML files; all by default."}
    )
    batch_size: int = field(default=32, metadata={"help": "Samples at a time in each process."})
    num_shots: int = field(default=0, metadata={"help": "Worked examples from the train part before each question."})
    max_samples: Optional[int] = field(default=None, metadata={"help": "At most so many of each task, by the seed."})
    max_new_tokens: Optional[int] = field(default=None, metadata={"help": "Longest answer; the task's by default."})
    blind: bool = field(default=False, metadata={"help": "Also answer about noise, without pictures, and never look."})
    resume: bool = field(default=False, metadata={"help": "Go on with the answers of an interrupted run."})
    idf: Optional[str] = field(default=None, metadata={"help": "CIDEr's table; made of the train part if not there."})
    java_metrics: list[str] = field(default_factory=list, metadata={"help": "METEOR, SPICE: need Java."})
    normalize: Literal["official", "always"] = field(default="official", metadata={"help": "VQA answers."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave out and count what cannot be scored."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default="auto", metadata={"help": "Of weights."})
    device: Optional[str] = field(
        default=None, metadata={"help": "Such as cpu or cuda:0; the best there is by default."}
    )
    seed: int = field(default=0, metadata={"help": "Draws samples, examples, noise and the bootstrap."})

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "num_shots": 0, "max_samples": 1, "max_new_tokens": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small; give at least {least}")
        given, folder = Path(self.predictions or "").resolve(), Path(self.output_dir).resolve()
        if self.predictions and folder in (given, given.parent):
            raise ValueError(
                f"predictions={self.predictions} lies in output_dir={self.output_dir}, which gets predictions of its "
                "own; give another output_dir"
            )

    def stream_records(self, part: str) -> int | None:
        """How many records of a stream are read: for worked examples and the commonest answers some thousands do."""
        return POOL if part == "train" else self.max_samples

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU answers: asked for, or all there is; accelerate joins processes of CPUs only if told."""
        return torch.device(self.device).type == "cpu" if self.device else not torch.accelerator.is_available()


@dataclass
class CompareArguments:
    output: Optional[str] = field(default=None, metadata={"help": "JSON file for all differences and changed samples."})
    shown: int = field(default=5, metadata={"help": "Worst losses and best wins to print of each task."})
    seed: int = field(default=0, metadata={"help": "Draws the bootstrap."})


class Task(NamedTuple):
    """A way to ask the records of one kind, and how the answers are scored; its fields are the keys of the YAML."""

    name: str
    reads: str
    metric: str
    max_new_tokens: int
    prompt: str = "{question}"

    def samples(self, samples: Iterable[Any]) -> list[Any]:
        """The samples that the task reads, in its words, under its name."""
        return [self._asked(sample) for sample in samples if sample.task == self.reads]

    def _asked(self, sample: Any) -> Any:
        *history, last = sample.prompt
        pictures = [part for part in last["content"] if part["type"] == "image"]
        text = {"type": "text", "text": self.prompt.replace("{question}", sample.question)}
        asked = {**last, "content": [*pictures, text]} if self.prompt != "{question}" else last
        return sample._replace(task=self.name, metric=self.metric, prompt=[*history, asked])


def load_tasks(names: Sequence[str], folder: Path) -> list[Task]:
    """The tasks of these names (files of the folder) or paths; all of the folder's where no name is given.

    Raises:
        ValueError: An unknown task, key, record kind or metric, a value of the wrong kind, or a name that metrics.json
            uses for something else.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    tasks = []
    for name in names or known:
        path = known.get(name, Path(name))
        if not path.is_file():
            raise ValueError(f"tasks: {name!r} is unknown; use {', '.join(known)} or the path of a task's YAML file")
        tasks.append(_task(path))
    if taken := [task.name for task in tasks if task.name in TAKEN]:
        raise ValueError(f"tasks: metrics.json has something else under {', '.join(taken)}; rename the file")
    if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        raise ValueError(f"tasks: {', '.join(twice)} is asked for twice; name each task once")
    return tasks


def _task(path: Path) -> Task:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not valid YAML: {error}") from None
    keys = {name: kind for name, kind in Task.__annotations__.items() if name != "name"}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {values!r}; give it the keys {', '.join(keys)}")
    for key, value in values.items():
        check_known(str(path), key, keys)
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r}; it must be {keys[key].__name__}")
    if missing := set(keys) - set(Task._field_defaults) - set(values):
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; add it")
    for key, choices in (("reads", READS), ("metric", METRICS)):
        check_known(f"{path}: {key}", values[key], choices)
    if values["max_new_tokens"] < 1:
        raise ValueError(f"{path}: max_new_tokens is {values['max_new_tokens']}; give at least 1")
    return Task(name=path.stem, **values)


def draw(samples: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """At most `count` samples of each task, in their order, the same ones for every model."""
    chosen: list[int] = []
    for task in dict.fromkeys(sample.task for sample in samples):
        places = [place for place, sample in enumerate(samples) if sample.task == task]
        chosen += places if count is None else random.Random(seed).sample(places, min(count, len(places)))
    return [samples[place] for place in sorted(chosen)]


def with_examples(samples: Sequence[Any], pool: Sequence[Any], num_shots: int, *, seed: int = 0) -> list[Any]:
    """The samples, each after `num_shots` worked examples of its own task from the pool (few-shot prompting).

    Which ones is drawn from the seed and the sample's id, so it is the same in every selection of samples and on every
    rank. None shows one of the sample's own pictures, none another's; pictures are compared by their pixels.

    Raises:
        ValueError: The pool has too few other pictures.
    """
    pools: dict[str, list[Any]] = defaultdict(list)
    for example in pool:
        pools[example.task].append(example)
    marks: dict[tuple[str, int], set[int]] = {}  # reading a picture costs more than anything else here
    shown = []
    for sample in samples:
        seen, shots, examples = _marks(sample), [], pools[sample.task]
        order = np.random.default_rng([seed, zlib.crc32(sample.id.encode())]).permutation(len(examples))
        for place in order:
            if len(shots) == num_shots:
                break
            key = sample.task, int(place)
            marks[key] = marks[key] if key in marks else _marks(examples[place])
            if seen.isdisjoint(marks[key]):
                shots.append(examples[place])
                seen = seen | marks[key]
        if len(shots) < num_shots:
            raise ValueError(
                f"num_shots={num_shots} exceeds the {len(shots)} other pictures to draw from for task "
                f"{sample.task!r}; lower it, or add such records to the train part"
            )
        shown.append(_after(sample, shots))
    return shown


def _marks(sample: Any) -> set[int]:
    return {hash((image.size, image.tobytes())) for image in sample.images}


def _after(sample: Any, shots: Sequence[Any]) -> Any:
    turns = []
    for shot in shots:
        turns += [message for message in shot.prompt if message["role"] != "system"]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": shot.target}]})
    system = [message for message in sample.prompt if message["role"] == "system"]
    own = [message for message in sample.prompt if message["role"] != "system"]
    # Only the pictures' readers are kept: the examples of a large test part need not fit in memory.
    readers = [*shots, sample]
    return sample._replace(
        prompt=system + turns + own,
        read_images=lambda: [one for each in readers for one in each.images],
        version=" ".join(dict.fromkeys(each.version for each in readers)),
    )
