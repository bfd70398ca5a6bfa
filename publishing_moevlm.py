# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""From a checkpoint to a Hub repository: the folder, its card, the proof that it loads alone, one commit."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import transformers
import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard

from .configuration_moevlm import MoeVlmConfig
from .sources_moevlm import Hub

# What an older commit may have left on the Hub and a newer one must not keep: a whole file wins over new shards.
REPLACED = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*", "*_moevlm.py")
TASKS = {"caption": "captions", "vqa": "questions", "chat": "dialogue turns"}
SOURCES = {
    "scenes": "drawn pictures of one to five coloured shapes with captions, questions and dialogues "
    "(`scenes_moevlm.py`, made from a seed)",
    "easy_vqa": "[easy-VQA](https://github.com/vzhou842/easy-VQA), questions on one coloured shape",
    "coco_captions": "[COCO captions](https://cocodataset.org), five descriptions of each photograph",
    "vqav2": "[VQAv2](https://visualqa.org), ten answers to each question on COCO photographs",
    "chat": "dialogues from a JSON-lines file",
    "hub": "a data set of the Hugging Face Hub",
}
USAGE = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

# Put here the commit whose code you have read, 40 hex digits: trust_remote_code runs that code.
name, revision = "REPO_ID", "main"
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)

question = [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]
prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.png")], text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

This runs on both transformers lines. Line 4.57 also knows the older name, which gives the same model:

```python
from transformers import AutoModelForVision2Seq

model = AutoModelForVision2Seq.from_pretrained(name, revision=revision, trust_remote_code=True)
```

Tested with the exact versions in `requirements.txt` (transformers 4.57) and `requirements-v5.txt` (transformers 5)."""

VERIFICATION = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model, loading = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True, dtype="auto"
)
assert not any(loading.values()), f"weights and code do not fit: {loading}"
question = [{"type": "image"}, {"type": "text", "text": "?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
inputs = processor(images=[Image.new("RGB", (48, 32), "gray")], text=prompt, return_tensors="pt").to(model.dtype)
length = inputs["input_ids"].shape[1]
assert model.generate(**inputs, max_new_tokens=1, do_sample=False).shape == (1, length + 1), "no token came out"
"""


class CardFacts(NamedTuple):
    """What the card says of one checkpoint."""

    repo_id: str
    license: str
    model: Mapping[str, str]  # what: value, see `describe`
    metrics: Mapping[str, Any] | None  # metrics.json of run_finetune.py or run_eval.py
    trained_on: list[Mapping[str, Any]] | None  # entries of data mixtures; None where nobody recorded them
    scored_on: list[Mapping[str, Any]] | None
    has_samples: bool = False


def read_checkpoint(path: str):
    """The model and processor of a checkpoint folder, every weight accounted for.

    Raises:
        ValueError: The weights do not fit the config.
    """
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype="auto", output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in loading.items() if keys}
    if wrong:
        raise ValueError(
            f"model_name_or_path={path}: weights and config do not fit: {wrong}; take a checkpoint that was saved whole"
        )
    processor = transformers.AutoProcessor.from_pretrained(path)
    if not isinstance(processor, transformers.ProcessorMixin):
        raise ValueError(f"model_name_or_path={path} holds no processor; save the model's processor beside it")
    return model, processor


def assemble(model, processor, checkpoint: Path, root: Path, folder: Path, max_shard_size: str) -> None:
    """Write everything but the card into `folder`: weights, configs, code, processor, requirements, licence.

    Args:
        root: The checkout, for licence and requirements.
    """
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    # Not metrics.json, which holds paths of the machine: the card tells its numbers.
    sources = [root / "LICENSE", root / "requirements.txt", root / "requirements-v5.txt", checkpoint / "samples.png"]
    for source in sources:
        if source.exists():
            shutil.copyfile(source, folder / source.name)


def describe(model) -> dict[str, str]:
    """The numbers of a model that its card shows."""
    config: MoeVlmConfig = model.config
    text, vision, connector = config.text_config, config.vision_config, config.connector_config
    summary = model.moe_summary()
    return {
        "Parameters": f"{summary.parameters:,}, of which {summary.active_parameters:,} work on a token",
        "Vision tower": f"{_layers(vision)}, {vision.image_size} x {vision.image_size} pixels",
        "Connector": f"{config.image_seq_length} tokens a picture, "
        + (f"{connector.num_experts} experts" if connector.num_experts else "dense"),
        "Decoder": f"{_layers(text)}, width {text.hidden_size}, {text.vocab_size:,} tokens in the vocabulary",
        "Stored as": str(model.dtype).removeprefix("torch."),
    }


def _layers(config) -> str:
    sparse = config.mlp_layer_types.count("sparse")
    experts = f" ({config.num_experts} experts, {config.num_experts_per_tok} a token)" if sparse else ""
    return f"{config.num_hidden_layers} layers, {sparse} of them sparse{experts}"


def render_card(template: str, facts: CardFacts) -> str:
    """The card with front matter, title and every marked section filled in; the text between them is the template's.

    A section stands between `<!-- name -->` and `<!-- /name -->`. A rendered card is itself a template.

    Raises:
        ValueError: The template lacks a section.
    """
    card = ModelCard(template)
    data = card.data
    name = facts.repo_id.partition("/")[2]
    data.license = facts.license
    data.datasets = sorted({_data_name(entry) for entry in facts.trained_on or [] if not entry.get("local")}) or None
    data.eval_results = _eval_results(facts) or None
    data.model_name = name if data.eval_results else None  # it is the name of the model-index
    data.metrics = sorted({result.metric_type for result in data.eval_results or []}) or None
    text = re.sub(r"^# .*$", f"# {name}", card.text, count=1, flags=re.MULTILINE)
    sections = {
        "model": _rows(["Property", "Value"], facts.model.items()),
        "usage": USAGE.replace("REPO_ID", facts.repo_id),
        "results": _results(facts),
        "data": _training_data(facts),
        "licence": f"Weights: {facts.license}. Code: Apache-2.0 (`LICENSE`).",
    }
    for section, content in sections.items():
        pattern = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
        # A function, because backslashes in a replacement string would be read as groups.
        text, found = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, count=1, flags=re.DOTALL)
        if not found:
            raise ValueError(f"the card lacks the section <!-- {section} --> … <!-- /{section} -->; put it back")
    card.text = text
    return str(card)


def _scores(results: Mapping[str, Any]):
    """Task, name, value and interval of each score; CIDEr of people's own captions is no score of the model."""
    scored = [task for task, scores in results.items() if isinstance(scores, Mapping) and "interval_95" in scores]
    for task in sorted(scored, key=[*TASKS, *scored].index):
        for name, interval in results[task]["interval_95"].items():
            if name != "CIDEr_references":
                yield task, name, results[task][name], interval


def _results(facts: CardFacts) -> str:
    if not facts.metrics:
        return "Not measured: the checkpoint has no `metrics.json`."
    references = [name for name in ("blind", "question_only") if name in facts.metrics]
    rows = []
    for task, name, value, (low, high) in _scores(facts.metrics):
        beside = [facts.metrics[column].get(task, {}).get(name) for column in references]
        beside = ["" if other is None else f"{other:.4g}" for other in beside]
        size = f"{facts.metrics[task].get('n_by_score', {}).get(name, facts.metrics[task]['n']):,}"
        rows.append([TASKS.get(task, task), name, f"**{value:.4g}**", f"{low:.4g} .. {high:.4g}", size, *beside])
    if not rows:
        return "Not measured: `metrics.json` holds no scores."
    header = ["Task", "Score", "Value", "95 % interval", "n", *(name.replace("_", " ") for name in references)]
    notes = [
        "Accuracies and F1 are percentages. CIDEr is on coco-caption's scale, 0..10 (papers print it times 100); BLEU "
        "and ROUGE-L are 0..1. `blind` is the same model with noise for pictures, on at most 1,000 samples of each "
        "task in training and on all in evaluation, `question only` the commonest training answer to the same words: "
        "what a model reaches without looking."
    ]
    for kind in ("answer_type", "question_type"):
        parts = facts.metrics.get("vqa", {}).get(f"per_{kind}") or {}
        if parts:
            scores = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
            notes.append(f"VQA accuracy by {kind.replace('_', ' ')}: {scores}.")
    if facts.has_samples:
        notes.append("![Questions, pictures, the model's answers and the truth](samples.png)")
    return "\n\n".join([_rows(header, rows), *notes])


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    names = _names(facts.scored_on)
    split = facts.scored_on[0].get("part", "test") if facts.scored_on else "test"
    where = {"task_type": "image-text-to-text", "dataset_split": split}
    where |= {"dataset_type": "-".join(names) or "held-out", "dataset_name": " + ".join(names) or "held-out data"}
    return [
        EvalResult(
            metric_type=name.lower(),
            metric_name=f"{name} ({TASKS.get(task, task)})",
            metric_value=round(value, 4),
            **where,
        )
        for task, name, value, _ in _scores(facts.metrics or {})
    ]


def _training_data(facts: CardFacts) -> str:
    if facts.trained_on is None:
        return "Not recorded with this checkpoint."
    rows = []
    for entry in facts.trained_on:
        shown = (f"{key} {entry[key]}" for key in ("name", "split", "size", "seed", "weight") if key in entry)
        what = "files of one's own" if entry.get("local") else SOURCES.get(entry["source"], "")
        rows.append([_data_name(entry), what, ", ".join(shown)])
    text = _rows(["Source", "What it is", "Settings"], rows)
    run = (facts.metrics or {}).get("training")
    if run:
        # Of a run that was resumed, seconds and mean loss are those of its last part.
        loss = f"mean loss {run['train_loss']:.4g}"
        numbers = "" if run.get("resumed_from") else f" in {run['train_seconds']:,.0f} s; {loss}"
        text += f"\n\n{run['steps']:,} optimizer steps{numbers}."
    return text


def _names(entries: list[Mapping[str, Any]] | None) -> list[str]:
    return sorted({_data_name(entry) for entry in entries or []})


def _data_name(entry: Mapping[str, Any]) -> str:
    """The name of a source; of local files their last part, because the rest tells of a machine."""
    if entry["source"] != "hub":
        return entry["source"]
    return Path(entry["path"]).name if entry.get("local") else str(entry["path"])


def _rows(header: list[str], rows) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def verify(folder: Path) -> None:
    """Load the folder the way a stranger does and generate one token: own process, other folder, no checkout, no net.

    Raises:
        RuntimeError: It does not load there; the message ends with the process's own.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(Path(elsewhere, "modules")), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", VERIFICATION, str(folder.resolve())]
        outcome = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(
            f"the assembled folder does not load with trust_remote_code=True, so nothing was published; the process "
            f"said:\n{outcome.stderr.strip()[-2000:]}"
        )


def upload(api: HfApi, folder: Path, repo_id: str, private: bool) -> CommitInfo:
    """Publish the folder as one commit, which also deletes an older version's weights and code.

    `HfApi.upload_folder` is not used: since hub 2 it may split a folder into several commits, and a repository between
    two of them does not load.

    Raises:
        PermissionError: `private` is asked for, but the repository exists and is public.
    """
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    now = api.model_info(repo_id)
    if private and not now.private:
        raise PermissionError(
            f"private=True, but repo_id={repo_id} exists and is public; make it private in its settings or choose "
            "another repo_id"
        )
    new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [file.rfilename for file in now.siblings if file.rfilename not in new]
    stale = [name for name in old if any(fnmatch(name, pattern) for pattern in REPLACED)]
    operations = [CommitOperationAdd(name, path) for name, path in new.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo_id, operations, commit_message="Publish MoeVlm", parent_commit=now.sha)


def read_mixtures(path: str | None, metrics: Mapping[str, Any]):
    """The mixture entries that a checkpoint was trained on, and those that it was scored on.

    Args:
        path: The training mixture; by default the one that the metrics name, None where they do not or it is gone.
    """
    trained, run = path or metrics.get("training", {}).get("data"), metrics.get("run", {})
    scored = run.get("data", trained)
    train = _mixture(trained).get("train") if trained and (path or Path(trained).exists()) else None
    if not scored or not Path(scored).exists():
        return train, None
    held_out = _mixture(scored)
    return train, held_out.get(run.get("part", "test")) or held_out.get("eval")


def _mixture(path: str) -> dict[str, Any]:
    """The parts of a mixture file; each entry knows its `part`, and whether a `hub` source is `local` files."""
    mixture = yaml.safe_load(Path(path).read_text(encoding="utf-8"))

    def is_local(entry):
        return entry["source"] == "hub" and Hub.is_local(entry["path"], Path(path).parent)

    return {
        part: [entry | {"part": part, "local": is_local(entry)} for entry in entries]
        for part, entries in mixture.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; write it again or remove it") from error
