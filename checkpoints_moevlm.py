# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints of a run: where it starts, and how it ends without harming what was there before."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoConfig, AutoProcessor, Trainer, TrainingArguments

from .configmaps_moevlm import check_fields
from .configuration_moevlm import MoeVlmConfig
from .modeling_moevlm import MoeVlmForConditionalGeneration
from .processing_moevlm import MoeVlmProcessor, build_processor, train_tokenizer
from .records_moevlm import read_json

# What commands write beside a model.
REPORTS = ("upcycling.json", "downcycling.json")
REPORTS_OF_RUNS = ("metrics.json", "predictions_*.json", "samples.png", "samples.jsonl", "report.html", "plots/*.png")
CONFIGS = ("config.json", "adapter_config.json")


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The folders that a run saves to, oldest first; one that a user named, such as checkpoint-10-best, is not its."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoints(output_dir: str) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that was cut off while saving has no trainer state yet."""
    return [path for path in checkpoint_folders(output_dir) if (path / "trainer_state.json").exists()]


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint of a run, None without one."""
    return str(found[-1]) if (found := checkpoints(output_dir)) else None


def starting_point(args: TrainingArguments, model: str | None = None) -> str | None:
    """The checkpoint to resume from, None for a fresh start, before which `clear` makes room.

    Args:
        model: The checkpoint whose weights training begins with.

    Raises:
        FileExistsError: A fresh start would destroy an unfinished run, the checkpoint that it begins with, or another
            program's model; or `output_dir` has checkpoints that a run would mistake for its own.
        FileNotFoundError: There is nothing to resume from, no such folder, or one without the optimizer's state.
    """
    wish = str(args.resume_from_checkpoint or "no")
    if wish.lower() in ("no", "false"):
        refuse_to_destroy(args, model)
        start = None
    elif wish.lower() not in ("last", "true"):
        start = wish
    elif (start := last_checkpoint(args.output_dir)) is None:
        raise FileNotFoundError(
            f"resume_from_checkpoint={wish}, but output_dir={args.output_dir} has no whole checkpoint; "
            "drop the flag to start anew"
        )
    if start:
        refuse_to_resume(args, Path(start))
    named = set(Path(args.output_dir).glob("checkpoint-[0-9]*")) - set(checkpoint_folders(args.output_dir))
    if named and args.save_total_limit:
        raise FileExistsError(
            f"{named.pop()} would be deleted by save_total_limit={args.save_total_limit}, which takes it for a "
            "checkpoint of the run; give it another name"
        )
    return start


def refuse_to_resume(args: TrainingArguments, start: Path) -> None:
    """Raise where a run cannot go on from a folder; errors as in `starting_point`."""
    if not start.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={start} is no folder; name a checkpoint-N folder, or last")
    optimizer = [*start.glob("optimizer*"), *start.glob("global_step*")]  # the second is DeepSpeed's
    if not optimizer or not (start / "trainer_state.json").exists():
        raise FileNotFoundError(
            f"resume_from_checkpoint={start} has no state of optimizer and run to go on with; name a checkpoint-N "
            "folder that has, or begin anew at its weights with --model_name_or_path"
        )
    *earlier, newest = checkpoints(args.output_dir) or [start]
    if start.resolve() in [path.resolve() for path in earlier]:
        raise FileExistsError(
            f"{newest} is later than resume_from_checkpoint={start} and would be taken for the last one of the run "
            "that goes on; move it out of output_dir, or choose another output_dir"
        )


def refuse_to_destroy(args: TrainingArguments, model: str | None) -> None:
    """Raise where what is in `output_dir` is still needed; errors as in `starting_point`."""
    target = Path(args.output_dir)
    saved = checkpoint_folders(args.output_dir)
    if model and any(Path(model).resolve().is_relative_to(path.resolve()) for path in saved):
        raise FileExistsError(
            f"model_name_or_path={model} is a checkpoint in output_dir={args.output_dir}, which a new run clears; "
            "choose another output_dir"
        )
    if model and Path(model).resolve() == target.resolve() and not args.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={args.output_dir} holds the model that training begins with; choose another output_dir, or "
            "let the result replace it with --overwrite_output_dir"
        )
    models = [folder for folder in (target, *saved) if any((folder / name).exists() for name in CONFIGS)]
    if not all(map(holds_our_model, models)):
        raise FileExistsError(f"output_dir={target} holds another program's model; choose another output_dir")
    if not saved and not args.overwrite_output_dir and any((target / name).exists() for name in REPORTS):
        raise FileExistsError(
            f"output_dir={target} holds a model that run_upcycle.py made; choose another output_dir, or replace it "
            "with --overwrite_output_dir"
        )
    finished = target / "metrics.json"
    states = [path / "trainer_state.json" for path in checkpoints(args.output_dir)]
    newest = max((path.stat().st_mtime for path in states), default=0.0)
    if states and not args.overwrite_output_dir and not (finished.exists() and finished.stat().st_mtime >= newest):
        raise FileExistsError(
            f"output_dir={args.output_dir} holds an unfinished run; go on with --resume_from_checkpoint last, "
            "delete it with --overwrite_output_dir, or choose another output_dir"
        )


def clear(args: TrainingArguments) -> None:
    """Delete the checkpoints of an earlier run; to be called when nothing but training can fail."""
    # Rank 0 first: the others shall not look while it deletes.
    with args.main_process_first(local=False, desc="output folder"):
        for path in checkpoint_folders(args.output_dir):
            shutil.rmtree(path)


def starting_model(
    arguments, words: Iterable[str], checkpoint: str | None = None
) -> tuple[MoeVlmForConditionalGeneration, MoeVlmProcessor]:
    """Model and processor of a checkpoint, or fresh ones of a config with a tokenizer that learns from `words`.

    Args:
        arguments: `model_name_or_path` and `dtype`, or `config` and `vocab_size`; `attn_implementation`.
        words: What the model will read; looked at only on the main process and only where a tokenizer is to learn.
        checkpoint: Where training goes on from: its weights, which are loaded later, know its tokenizer alone.

    Raises:
        ValueError: The checkpoint holds a model of another kind.
    """
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if path := arguments.model_name_or_path:
        if Path(path, "adapter_config.json").exists():
            raise ValueError(f"model_name_or_path={path} is a LoRA adapter; give the folder of the merged model")
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != MoeVlmConfig.model_type:
            raise ValueError(f"model_name_or_path={path} holds a {kind!r} model; run_upcycle.py makes a MoeVlm of it")
        dtype = getattr(torch, arguments.dtype)
        model = MoeVlmForConditionalGeneration.from_pretrained(path, dtype=dtype, **attention)
        return model, AutoProcessor.from_pretrained(path)
    config = read_config(arguments.config)
    vocab_size = arguments.vocab_size or config.text_config.vocab_size
    if checkpoint:
        tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    else:
        tokenizer = train_tokenizer(words, vocab_size) if PartialState().is_main_process else None
        tokenizer = broadcast_object_list([tokenizer])[0]
    for part in (config, config.text_config):
        part.pad_token_id, part.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = MoeVlmForConditionalGeneration._from_config(config, **attention)
    return model, build_processor(config, tokenizer)


def read_config(path: str) -> MoeVlmConfig:
    """The config that a JSON file of its fields describes.

    Raises:
        ValueError: A field that our configs do not have, or a file of another form.
    """
    fields = read_json(Path(path))
    kinds = {"the whole": MoeVlmConfig, **MoeVlmConfig.sub_configs}
    for part, kind in kinds.items():
        given = fields if kind is MoeVlmConfig else fields.get(part, {})
        check_fields(given, kind, f"config={path}: {part}")
    return MoeVlmConfig(**fields)


def finish(trainer: Trainer) -> nn.Module:
    """Save the finished model into `output_dir`, an adapter beside its merged whole, and give the bare model.

    All is written into a sibling folder first and moved when it is whole: a failing run leaves an older checkpoint
    in `output_dir` as it was.
    """
    args = trainer.args
    target, incoming = Path(args.output_dir), Path(args.output_dir, ".incoming")
    if args.should_save:
        shutil.rmtree(incoming, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if hasattr(model, "merge_and_unload"):
        trainer.save_model(str(incoming / "adapter"))
        model = model.merge_and_unload()
        if args.should_save:
            model.save_pretrained(incoming)
            trainer.processing_class.save_pretrained(incoming)
    else:
        trainer.save_model(str(incoming))
    if args.should_save:
        move_into(incoming, target)
    trainer.accelerator.wait_for_everyone()
    return model


def move_into(incoming: Path, target: Path) -> None:
    """Replace the files of a checkpoint by those of a newer one, and drop the older one's other weights."""
    # Pickled arguments name our training classes; nobody needs them to use the model.
    for pickled in incoming.rglob("training_args.bin"):
        pickled.unlink()
    for pattern in (*REPORTS, *REPORTS_OF_RUNS):  # on the older model
        for report in target.glob(pattern):
            report.unlink()
    new = sorted(path for path in incoming.rglob("*") if path.is_file())
    for path in new:
        place = target / path.relative_to(incoming)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    names = {path.name for path in new}
    for old in target.glob("model*.safetensors*"):
        if old.name not in names:
            old.unlink()
    if not (incoming / "adapter").exists():
        shutil.rmtree(target / "adapter", ignore_errors=True)
    shutil.rmtree(incoming)


@contextmanager
def whole_folder(output_dir: str, overwrite: bool = False, sources: Iterable[str] = ()) -> Iterator[Path]:
    """A folder that takes the place of `output_dir` once it is whole, and vanishes if anything fails.

    At every instant the old folder or the new one is whole; what a killed run moved aside is moved back by the next.

    Args:
        overwrite: Replace a folder of ours.
        sources: What the new content is made from.

    Raises:
        FileExistsError: `output_dir` is a file; or it is not empty, and `overwrite` does not allow to replace it, or it
            holds nothing of ours, or one of the sources in a folder below, or it is the folder that the command runs
            in; or the name for moving it aside is taken.
    """
    target = Path(output_dir).resolve()
    incoming, old = (target.with_name(f".{target.name}.{role}") for role in ("incoming", "old"))
    if target.is_file():
        raise FileExistsError(f"output_dir={target} is a file; choose another, or remove it")
    if old.exists() and not is_ours(old):
        raise FileExistsError(f"{old}, where output_dir={target} is moved aside, holds no model of ours; rename it")
    shutil.rmtree(incoming, ignore_errors=True)
    if old.exists():
        old.rename(incoming if target.exists() else target)
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise FileExistsError(f"output_dir={target} is not empty; choose another, or add --overwrite_output_dir")
        if Path.cwd().is_relative_to(target) or not is_ours(target):
            raise FileExistsError(
                f"output_dir={target} is not replaced by --overwrite_output_dir: it holds no model of ours, or the "
                "command runs in it; choose another, or empty it yourself"
            )
    here = (source for source in sources if Path(source).exists())  # the others are Hub ids
    if inside := [source for source in here if target in Path(source).resolve().parents]:
        raise FileExistsError(f"output_dir={target} holds {inside[0]}, which is read; choose another output_dir")
    try:
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        yield incoming
        swap(incoming, target, old)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def is_ours(folder: Path) -> bool:
    """Whether a command of ours wrote this folder: a model, a report about one, a run's checkpoints; or it is empty."""
    if (folder / "config.json").exists():
        return holds_our_model(folder)
    if saved := checkpoint_folders(folder):
        return any(map(holds_our_model, saved))  # the last may have been cut off before its config
    return any((folder / name).exists() for name in REPORTS) or (folder.is_dir() and not any(folder.iterdir()))


def holds_our_model(folder: Path) -> bool:
    """Whether a folder's config is a MoeVlm's, or, where LoRA saved its adapter alone, the adapter's base model is."""
    try:
        if (path := folder / "config.json").exists():
            return json.loads(path.read_text(encoding="utf-8"))["model_type"] == MoeVlmConfig.model_type
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return adapter["auto_mapping"]["base_model_class"] == MoeVlmForConditionalGeneration.__name__
    except (OSError, ValueError, KeyError, TypeError):  # missing, no JSON, other JSON: another program's
        return False


def swap(incoming: Path, target: Path, old: Path) -> None:
    """Give `incoming` the name `target`, and what was there the name `incoming`; `old` is its name in between."""
    try:
        if target.exists():
            target.rename(old)
        incoming.rename(target)
        if old.exists():
            # Never deleted under its own name: what a killed deletion leaves of it would be moved back as if whole.
            old.rename(incoming)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
