# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The checkpoints of a run: where it starts, and how it ends without harming what was there before."""

import os
import shutil
from pathlib import Path

from torch import nn
from transformers import Trainer, TrainingArguments


def checkpoints(output_dir: str) -> list[Path]:
    """The whole checkpoints of a run, oldest first; one that was cut off while saving has no trainer state yet."""
    found = [path.parent for path in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(output_dir: str) -> str | None:
    """The newest whole checkpoint of a run, None without one."""
    return str(found[-1]) if (found := checkpoints(output_dir)) else None


def starting_point(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from, None for a fresh start; a fresh start clears what a finished run left.

    Raises:
        FileExistsError: A fresh start would destroy an unfinished run.
        FileNotFoundError: There is nothing to resume from.
    """
    wish = str(args.resume_from_checkpoint or "no")
    if wish.lower() in ("no", "false"):
        # Rank 0 first: the others shall not look while it deletes.
        with args.main_process_first(local=False, desc="output folder"):
            clear(args)
        return None
    if wish.lower() not in ("last", "true"):
        return wish
    if (last := last_checkpoint(args.output_dir)) is None:
        raise FileNotFoundError(
            f"resume_from_checkpoint={wish}, but output_dir={args.output_dir} has no whole checkpoint; "
            "drop the flag to start anew"
        )
    return last


def clear(args: TrainingArguments) -> None:
    """Delete the checkpoints of an earlier run, if it finished or `overwrite_output_dir` allows it."""
    finished = Path(args.output_dir, "metrics.json")
    states = [path / "trainer_state.json" for path in checkpoints(args.output_dir)]
    newest = max((path.stat().st_mtime for path in states), default=0.0)
    if states and not args.overwrite_output_dir and not (finished.exists() and finished.stat().st_mtime >= newest):
        raise FileExistsError(
            f"output_dir={args.output_dir} holds an unfinished run; go on with --resume_from_checkpoint last, "
            "delete it with --overwrite_output_dir, or choose another output_dir"
        )
    for path in Path(args.output_dir).glob("checkpoint-*"):
        shutil.rmtree(path)


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
