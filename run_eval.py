# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Score a checkpoint, ours or any image-text-to-text model of transformers, on a data mixture.

    python run_eval.py --model_name_or_path outputs/demo --output_dir outputs/demo/eval --blind
    torchrun --nproc_per_node 2 run_eval.py --model_name_or_path outputs/demo --num_shots 2 --max_samples 200

Writes metrics.json, predictions_<task>.json (COCO results, VQA server form, dialogue turns) and samples.png.
"""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import evaluate
import transformers
from accelerate import PartialState
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from moevlm.data_moevlm import load_mixture
from moevlm.evaluation_moevlm import (
    TASKS,
    draw_samples,
    predict,
    question_only_floor,
    samples_from,
    score,
    with_examples,
)
from moevlm.reporting_moevlm import table

ROOT = Path(__file__).resolve().parent
METRICS = ("cider", "caption_overlap", "vqa_accuracy")
# Keys of an answer's id and text: COCO results, VQA server form, and the like for dialogues.
PREDICTION_FORMS = {"caption": ("image_id", "caption"), "vqa": ("question_id", "answer"), "chat": ("turn_id", "answer")}


@dataclass
class EvalArguments:
    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the checkpoint."})
    data: str = field(default=str(ROOT / "configs/data/default.yaml"), metadata={"help": "Mixture to score on."})
    output_dir: str = field(default="outputs/eval", metadata={"help": "Folder for scores and predictions."})
    part: Literal["test", "eval"] = field(default="test", metadata={"help": "Part of the mixture."})
    batch_size: int = field(default=32, metadata={"help": "Samples at a time in each process."})
    num_shots: int = field(default=0, metadata={"help": "Worked examples from the train part before each question."})
    max_samples: int | None = field(default=None, metadata={"help": "At most so many of each task, drawn by the seed."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Longest answer; by task if not given."})
    blind: bool = field(default=False, metadata={"help": "Also answer about noise, and never look (question only)."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default="auto", metadata={"help": "Of weights."})
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:0; the best there is by default."})
    seed: int = field(default=0, metadata={"help": "Draws samples, examples, noise and the bootstrap."})


def main():
    (args,) = transformers.HfArgumentParser(EvalArguments).parse_args_into_dataclasses()
    state = PartialState(cpu=args.device == "cpu")
    model, processor = load(args.model_name_or_path, args.dtype, args.device or state.device)
    with state.main_process_first():
        samples = read_samples(args, args.part)
        train = read_samples(args, "train") if args.blind or args.num_shots else []
    prompts = with_shots(samples, train, args) if args.num_shots else samples
    settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    start = time.perf_counter()
    predictions = predict(model, processor, prompts, **settings)
    seconds = time.perf_counter() - start
    blind = predict(model, processor, prompts, blind=True, **settings) if args.blind else []
    if state.is_main_process:
        metrics = {name: evaluate.load(str(ROOT / "metrics" / name)) for name in METRICS}
        columns = {args.part: score(samples, predictions, metrics, seed=args.seed)}
        if args.blind:
            columns["blind"] = score(samples, blind, metrics, seed=args.seed)
            columns["question_only"] = question_only_floor(train, samples, metrics, seed=args.seed)
        print(table(columns))
        speed = {"seconds": seconds, "answers_per_second": len(samples) / seconds, "processes": state.num_processes}
        run = asdict(args) | speed | {"transformers": transformers.__version__}
        write(Path(args.output_dir), samples, predictions, columns.pop(args.part) | columns | {"run": run})
        print(f"{speed['answers_per_second']:.0f} answers a second; scores and predictions are in {args.output_dir}")
    state.destroy_process_group()


def load(name: str, dtype: str, device):
    """The model and its processor, on the device."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"model_name_or_path={name}: no folder with a config.json under {Path.cwd()}, and the Hub gave none; "
            f"check the path ({str(error).splitlines()[0]})"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model_name_or_path={name} holds a {config.model_type!r} model, which does not turn images and text "
            f"into text; give a MoeVlm or another image-text-to-text checkpoint"
        )
    processor = transformers.AutoProcessor.from_pretrained(name)
    if not isinstance(processor, transformers.ProcessorMixin):
        raise ValueError(f"model_name_or_path={name} holds no processor; save the model's processor beside it")
    return transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device), processor


def read_samples(args, part: str):
    """What the part asks; of the scored part at most `max_samples` of each task, the same for every model."""
    rows = load_mixture(args.data, part, grouped=False)
    if part == "train" or args.max_samples is None:
        return samples_from(rows)
    samples = samples_from(rows if isinstance(rows, datasets.Dataset) else rows.take(args.max_samples))
    chosen = []
    for task in TASKS:
        places = [place for place, sample in enumerate(samples) if sample.task == task]
        chosen += random.Random(args.seed).sample(places, min(args.max_samples, len(places)))
    return [samples[place] for place in sorted(chosen)]


def with_shots(samples, train, args):
    """The samples, each after worked examples of its own task."""
    pools = {task: [example for example in train if example.task == task] for task in TASKS}
    return [with_examples(sample, pools[sample.task], args.num_shots, seed=args.seed) for sample in samples]


def write(folder: Path, samples, predictions, results) -> None:
    """Leave every file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"metrics.json": results}
    for task, (key, value) in PREDICTION_FORMS.items():
        pairs = [(sample, said) for sample, said in zip(samples, predictions, strict=True) if sample.task == task]
        # The official files count in integers; other ids stay as they are.
        rows = [{key: int(one.id) if one.id.isdecimal() else one.id, value: said} for one, said in pairs]
        if rows:
            contents[f"predictions_{task}.json"] = rows
    for name, content in contents.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        replace(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    replace(folder / "samples.png", lambda path: draw_samples(samples, predictions, str(path)))


def replace(path: Path, save: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    save(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
