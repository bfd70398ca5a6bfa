# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Train a MoeVlm, from scratch or from a checkpoint; score it; leave a checkpoint that loads anywhere.

    accelerate launch run_finetune.py
    accelerate launch run_finetune.py --model_name_or_path outputs/demo --lora --output_dir outputs/demo-lora

The first line, with no flag at all, is `--recipe configs/recipes/demo.yaml`: it trains `configs/tiny.json` on
`configs/data/default.yaml` into `outputs/demo`.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import datasets
import evaluate
import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import logging, set_seed

from moevlm.checkpoints_moevlm import clear, finish, starting_model, starting_point
from moevlm.collating_moevlm import MoeVlmCollator, encode_or_skip, encode_record, without_skipped
from moevlm.data_moevlm import DataArguments, load_mixture
from moevlm.evaluation_moevlm import predict, samples_from, score
from moevlm.memory_moevlm import keep_freed_memory
from moevlm.recipes_moevlm import parse
from moevlm.report_moevlm import draw_samples
from moevlm.reporting_moevlm import headlines, plot_run, run_numbers, table
from moevlm.tasks_moevlm import draw
from moevlm.training_moevlm import ModelArguments, MoeVlmTrainer, MoeVlmTrainingArguments, adapt

ROOT = Path(__file__).resolve().parent
METRICS = ("cider", "caption_overlap", "vqa_accuracy")
TOKENIZER_RECORDS = 20_000
BLIND_SAMPLES = 1_000  # of each task: a floor needs no finer figure


def main():
    model_args, data_args, args = read_arguments()
    checkpoint = starting_point(args, model_args.model_name_or_path)
    if args.use_cpu:
        keep_freed_memory()
    set_seed(args.seed)
    with args.main_process_first(desc="data"):
        records = read_records(data_args, args.seed)
        metrics = {name: evaluate.load(str(ROOT / "metrics" / name)) for name in METRICS}
    model, processor = starting_model(model_args, texts(records["train"]), checkpoint)
    model = adapt(model, model_args)
    with args.main_process_first(desc="encoding"):
        train_set, eval_set = (encode(records[part], processor, data_args) for part in ("train", "dev"))

    def answer(model, samples, blind=False):
        return predict(model, processor, samples, batch_size=args.per_device_eval_batch_size, blind=blind)

    dev_samples = samples_from(records["eval"])
    trainer = MoeVlmTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=MoeVlmCollator(processor),
        processing_class=processor,
        score_fn=lambda model: headlines(score(dev_samples, answer(model, dev_samples), metrics)),
    )
    if trainer.is_world_process_zero():
        print(model.moe_summary())
    if checkpoint is None:
        clear(args)
    training = trainer.train(resume_from_checkpoint=checkpoint)
    model = finish(trainer)
    test_samples = samples_from(records["test"])
    blind_samples = draw(test_samples, BLIND_SAMPLES, args.seed)
    predictions, blind = answer(model, test_samples), answer(model, blind_samples, blind=True)
    if trainer.is_world_process_zero():
        trainer.save_state()
        results, floor = score(test_samples, predictions, metrics), score(blind_samples, blind, metrics)
        draw_samples(test_samples, predictions, f"{args.output_dir}/samples.png")
        plot_run(trainer.state.log_history, f"{args.output_dir}/plots")
        run = {"data": str(Path(data_args.data).resolve()), "seed": args.seed, "epochs": args.num_train_epochs}
        run |= {"resumed_from": checkpoint} | run_numbers(trainer.state, training.metrics, model)
        numbers = {**results, "blind": floor, "training": run}
        Path(args.output_dir, "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
        print(
            f"\n{table({'model': results, 'blind': floor})}\n\nblind: on noise, {BLIND_SAMPLES} samples a task at most"
        )
        print(f"Checkpoint, plots and samples: {args.output_dir}")
    trainer.accelerator.end_training()


def read_arguments():
    """The three argument groups; the library's chatter is switched off, errors and warnings stay."""
    flags = sys.argv[1:] or ["--recipe", str(ROOT / "configs" / "recipes" / "demo.yaml")]
    model_args, data_args, args = parse((ModelArguments, DataArguments, MoeVlmTrainingArguments), flags)
    if not (model_args.model_name_or_path or model_args.config):
        model_args.config = str(ROOT / "configs" / "tiny.json")
    data_args.data = data_args.data or str(ROOT / "configs" / "data" / "default.yaml")
    logging.set_verbosity_warning()
    datasets.disable_progress_bars()
    return model_args, data_args, args


def read_records(data_args, seed):
    """The records to train on and to follow the loss with (grouped), and to score with (ungrouped)."""
    limits = {"train": data_args.max_samples, "dev": data_args.eval_max_samples}
    limits |= {"eval": data_args.eval_max_samples, "test": data_args.test_max_samples}
    records = {}
    for name, limit in limits.items():
        grouped, part = name in ("train", "dev"), "eval" if name == "dev" else name
        options = {"skip_bad_rows": data_args.skip_bad_rows, "most_of_a_stream": limit}
        rows = load_mixture(data_args.data, part, grouped=grouped, **options)
        if limit is not None and isinstance(rows, Dataset):
            rows = rows.shuffle(seed=seed).select(range(min(limit, len(rows))))
        records[name] = rows
    return records


def texts(records):
    """The words of so many records, from all over the mixture, that a tokenizer can learn from them."""
    words = records.select_columns(["messages"])
    if isinstance(words, Dataset):
        words = words.select(range(0, len(words), max(1, len(words) // TOKENIZER_RECORDS)))
    for record in islice(words, 2 * TOKENIZER_RECORDS):
        for message in record["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def encode(records, processor, data_args):
    """Token ids, labels and packing of each record, beside its still undecoded pictures."""
    kept = [name for name in ("images", "stage", "shift") if name in records.column_names]
    columns = [name for name in records.column_names if name not in kept]
    known = {"processor": processor, "max_length": data_args.max_length}
    function = encode_or_skip if data_args.skip_bad_rows else encode_record
    settings = {"function": function, "fn_kwargs": known, "remove_columns": columns}
    if not isinstance(records, Dataset):
        encoded = records.map(**settings)
    else:
        # Copies of a record are encoded once.
        names = records["record"][:] if "record" in columns else range(len(records))
        _, first, copies = np.unique(names, return_index=True, return_inverse=True)
        settings["num_proc"] = data_args.preprocessing_num_workers
        encoded = records.select(first).select_columns(columns).map(**settings).select(copies)
        encoded = concatenate_datasets([records.select_columns(kept), encoded], axis=1)
    return without_skipped(encoded) if data_args.skip_bad_rows else encoded


if __name__ == "__main__":
    main()
