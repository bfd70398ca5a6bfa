# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Publish a checkpoint on the Hugging Face Hub: weights, code, processor, and a card with its measured results.

    python run_publish.py --model_name_or_path outputs/demo --repo_id acme/moevlm-demo --dry_run
    python run_publish.py --model_name_or_path outputs/demo --repo_id acme/moevlm-demo --private

Nothing is uploaded before the assembled folder has loaded and generated in a process without this checkout; then all
of it goes up in one commit.
"""

import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser, logging

from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.publishing_moevlm import (
    CardFacts,
    assemble,
    describe,
    read_checkpoint,
    read_json,
    read_mixtures,
    render_card,
    upload,
    verify,
)

ROOT = Path(__file__).resolve().parent


@dataclass
class PublishArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of the checkpoint."})
    repo_id: str = field(metadata={"help": "Where it goes, organisation/name; made if it is not there."})
    private: bool = field(default=False, metadata={"help": "Only you and the organisation see it."})
    dry_run: bool = field(default=False, metadata={"help": "Assemble and verify, upload nothing."})
    output_dir: Optional[str] = field(default=None, metadata={"help": "Also keep the assembled folder here."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weight file."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, an identifier of the Hub."})
    card: str = field(default=str(ROOT / "model_card.md"), metadata={"help": "Template of the card."})
    data: Optional[str] = field(
        default=None, metadata={"help": "Mixture that it was trained on; what metrics.json names by default."}
    )


def main():
    (args,) = HfArgumentParser(PublishArguments).parse_args_into_dataclasses()
    logging.set_verbosity_warning()
    check(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, args.repo_id.partition("/")[2])
        fill(folder, args)
        verify(folder)
        print(f"{contents(folder)}\n\nThe folder loads alone with trust_remote_code=True, and generates.")
        if args.output_dir:
            shutil.copytree(folder, args.output_dir, dirs_exist_ok=True)
            print(f"Kept in {args.output_dir}")
        if not args.dry_run:
            print(publish(folder, args))


def check(args) -> None:
    """Refuse, before anything is made, what could not be published."""
    checkpoint = Path(args.model_name_or_path)
    if args.repo_id.count("/") != 1:
        raise ValueError(f"repo_id={args.repo_id!r} must be organisation/name, such as acme/{checkpoint.name}")
    validate_repo_id(args.repo_id)
    if not (checkpoint / "config.json").exists():
        hint = "give the folder of a checkpoint"
        if (checkpoint / "adapter_config.json").exists():
            hint = "it holds a LoRA adapter; give the folder of the merged model"
        raise FileNotFoundError(f"model_name_or_path={checkpoint} has no config.json; {hint}")
    kind = read_json(checkpoint / "config.json").get("model_type")
    if kind != MoeVlmConfig.model_type:
        raise ValueError(
            f"model_name_or_path={checkpoint} holds a {kind!r} model; this publishes {MoeVlmConfig.model_type!r}, "
            "and run_upcycle.py makes one of it"
        )
    if args.output_dir and any(Path(args.output_dir).glob("*")):
        raise FileExistsError(f"output_dir={args.output_dir} is not empty; choose another or delete it")
    if not args.dry_run and get_token() is None:
        raise PermissionError("no token for the Hub; run `hf auth login`, set HF_TOKEN, or try with --dry_run")


def fill(folder: Path, args) -> None:
    """Make the folder as it shall stand on the Hub."""
    checkpoint = Path(args.model_name_or_path)
    measured = checkpoint / "metrics.json"
    if not measured.exists():
        warnings.warn(
            f"{checkpoint} has no metrics.json, so the card will say 'not measured'; run_eval.py "
            f"--model_name_or_path {checkpoint} --output_dir {checkpoint} writes it",
            stacklevel=2,
        )
    metrics = read_json(measured) if measured.exists() else None
    model, processor = read_checkpoint(args.model_name_or_path)
    assemble(model, processor, checkpoint, ROOT, folder, args.max_shard_size)
    trained_on, scored_on = read_mixtures(args.data, metrics or {})
    if trained_on is None:
        warnings.warn("the card will not name the training data; give its mixture with --data", stacklevel=2)
    facts = CardFacts(
        repo_id=args.repo_id,
        license=args.license,
        model=describe(model),
        metrics=metrics,
        trained_on=trained_on,
        scored_on=scored_on,
        has_samples=(folder / "samples.png").exists(),
    )
    card = render_card(Path(args.card).read_text(encoding="utf-8"), facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


def contents(folder: Path) -> str:
    """A line for each file and its size, and their sum."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*"))}
    sizes["total"] = sum(sizes.values())
    width = max(map(len, sizes))
    return "\n".join(f"{name:<{width}}  {size:>15,} bytes" for name, size in sizes.items())


def publish(folder: Path, args) -> str:
    """Upload; gives the line that loads exactly this commit."""
    try:
        commit = upload(HfApi(), folder, args.repo_id, args.private)
    except HfHubHTTPError as error:
        raise OSError(
            f"the Hub refused repo_id={args.repo_id}, and nothing of it was published: {error}; see with "
            "`hf auth whoami` that the token may write there, then run the same line again"
        ) from error
    call = f'from_pretrained("{args.repo_id}", revision="{commit.oid}", trust_remote_code=True)'
    return f"Published: {commit.commit_url}\nAutoModelForImageTextToText.{call}"


if __name__ == "__main__":
    main()
