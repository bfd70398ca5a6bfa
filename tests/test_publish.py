"""What `run_publish.py` and `push_to_hub` put on the Hub loads there, is described truly, and arrives whole or not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from conftest import tiny_config
from hub_stand_in import TOKEN
from PIL import Image

import run_publish
from moevlm.configuration_moevlm import AUTO_MAP
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer
from moevlm.publishing_moevlm import CardFacts, describe, read_checkpoint, read_mixtures, render_card, upload, verify

ROOT = Path(run_publish.__file__).parent
TEMPLATE = (ROOT / "model_card.md").read_text(encoding="utf-8")
INTERVALS = {"vqa_accuracy": [97.0, 99.0], "exact_match": [96.5, 98.5]}
METRICS = {
    "vqa": {
        "vqa_accuracy": 98.25,
        "exact_match": 97.5,
        "per_answer_type": {"colour": 99.0, "count": 91.0},
        "n": 1200,
        "interval_95": INTERVALS,
    },
    "blind": {"vqa": {"vqa_accuracy": 31.5, "exact_match": 30.0, "n": 1200, "interval_95": INTERVALS}},
    "training": {"steps": 600, "train_seconds": 88.0, "train_loss": 0.125},
}
MIXTURE = {
    "train": [{"source": "scenes", "split": "train", "size": 4000, "seed": 0}],
    "test": [{"source": "scenes", "split": "test", "size": 500, "seed": 0}],
}
FACTS = CardFacts("acme/tiny", "apache-2.0", {"Parameters": "12"}, METRICS, MIXTURE["train"], MIXTURE["test"])


@pytest.fixture(scope="module")
def tiny_pair():
    """A tiny model and a processor that fit each other."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Describe the picture.", "a red circle"] * 9, 280)
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=None)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return MoeVlmForConditionalGeneration(config).eval(), build_processor(config, tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tiny_pair, tmp_path_factory):
    """A checkpoint folder as `run_finetune.py` leaves it."""
    folder = tmp_path_factory.mktemp("run")
    for part in tiny_pair:
        part.save_pretrained(folder)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(MIXTURE))
    numbers = METRICS | {"training": METRICS["training"] | {"data": str(folder / "mixture.yaml")}}
    (folder / "metrics.json").write_text(json.dumps(numbers))
    Image.new("RGB", (8, 8)).save(folder / "samples.png")
    return folder


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    """The folder that a dry run keeps; assembled and verified once."""
    folder = tmp_path_factory.mktemp("kept") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        command(patch, checkpoint, "--dry_run", "--output_dir", folder, "--max_shard_size", "200KB")
    return folder


def command(monkeypatch, checkpoint, *flags, repo_id="acme/tiny"):
    line = ["run_publish.py", "--model_name_or_path", checkpoint, "--repo_id", repo_id, *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    run_publish.main()


def stranger(code, folder, **environment):
    """Standard output of code in a process that has never heard of this checkout."""
    environment = os.environ | {"HF_HOME": str(folder / "home"), "PYTHONPATH": ""} | environment
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_dry_run_assembles_all_that_a_repository_needs(published):
    names = {path.name for path in published.iterdir()}
    code = {f"{name}_moevlm.py" for name in ("configuration", "base", "experts", "vision", "modeling", "processing")}
    assert code <= names
    assert {"config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    assert {"README.md", "LICENSE", "requirements.txt", "requirements-v5.txt", "samples.png"} <= names
    assert len(list(published.glob("model-*.safetensors"))) > 1, "max_shard_size was not heeded"
    assert not names & {
        "moevlm.py",
        "requirements-dev.txt",
        "metrics.json",
        "training_moevlm.py",
        "publishing_moevlm.py",
    }


def test_the_files_are_those_that_both_lines_read(published):
    config, processor, tokenizer = (
        json.loads((published / f"{name}.json").read_text())
        for name in ("config", "processor_config", "tokenizer_config")
    )
    assert config["auto_map"] == AUTO_MAP
    assert processor["auto_map"]["AutoProcessor"] == "processing_moevlm.MoeVlmProcessor"
    assert "image_processor" not in processor and (published / "preprocessor_config.json").exists()
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_folder_that_does_not_load_alone_is_refused(published, tmp_path):
    for path in published.iterdir():
        if path.name != "experts_moevlm.py":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(RuntimeError, match="experts_moevlm"):
        verify(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(checkpoint, tmp_path):
    model, processor = read_checkpoint(str(checkpoint))
    del model.lm_head
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        read_checkpoint(str(tmp_path))


def test_the_command_publishes_one_commit_and_the_card_tells_how_to_load_it(
    hub, checkpoint, published, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(run_publish, "verify", lambda folder: None)  # the fixture `published` ran it for real
    command(monkeypatch, checkpoint, "--private", "--max_shard_size", "200KB")
    repo = hub.repos["acme/tiny"]
    assert repo.private and len(repo.commits) == 2, "the Hub's own first commit and ours"
    assert repo.files.keys() - {".gitattributes"} == {path.name for path in published.iterdir()}
    for path in [*published.glob("*.safetensors"), *published.glob("*.py"), published / "README.md"]:
        assert repo.files[path.name] == path.read_bytes(), path.name
    assert f'revision="{repo.sha}"' in capsys.readouterr().out

    Image.new("RGBA", (40, 30), "red").save(tmp_path / "picture.png")
    blocks = re.findall(r"```python\n(.*?)```", repo.files["README.md"].decode(), re.DOTALL)
    blocks = blocks if hasattr(transformers, "AutoModelForVision2Seq") else blocks[:1]
    assert stranger("\n".join(blocks).replace('"main"', f'"{repo.sha}"'), tmp_path).strip()


@pytest.mark.parametrize(
    "call", ['push_to_hub("acme/pushed")', 'save_pretrained("saved", push_to_hub=True, repo_id="acme/pushed")']
)
def test_push_to_hub_of_model_and_processor_is_enough_to_load_them(call, hub, checkpoint, tiny_pair, tmp_path):
    push = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import moevlm, transformers
for auto in (transformers.AutoModelForImageTextToText, transformers.AutoProcessor):
    auto.from_pretrained({str(checkpoint)!r}).{call}
"""
    stranger(push, tmp_path)
    load = f"""
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
source = {{"revision": "{hub.repos["acme/pushed"].sha}", "trust_remote_code": True}}
model = AutoModelForImageTextToText.from_pretrained("acme/pushed", **source)
processor = AutoProcessor.from_pretrained("acme/pushed", **source)
inputs = processor(images=[Image.new("RGB", (9, 9), "blue")], text="<image>a red circle", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist())
"""
    model, processor = tiny_pair
    inputs = processor(images=[Image.new("RGB", (9, 9), "blue")], text="<image>a red circle", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
    assert json.loads(stranger(load, tmp_path)) == expected


def test_publishing_again_leaves_no_older_weights_behind(hub, published, tmp_path):
    api = huggingface_hub.HfApi()
    upload(api, published, "acme/tiny", private=False)
    (tmp_path / "model.safetensors").write_bytes(b"whole")
    upload(api, tmp_path, "acme/tiny", private=False)
    files = hub.repos["acme/tiny"].files
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    assert "experts_moevlm.py" not in files and "LICENSE" in files


def test_a_failing_upload_publishes_nothing_and_can_be_repeated(hub, published, monkeypatch):
    args = run_publish.PublishArguments(str(published), "acme/tiny")
    hub.broken_path = "/commit/main"
    with pytest.raises(OSError, match=r"(?s)refused repo_id=acme/tiny.*run the same line again"):
        run_publish.publish(published, args)
    assert list(hub.repos["acme/tiny"].files) == [".gitattributes"]
    hub.broken_path = None
    run_publish.publish(published, args)
    assert "config.json" in hub.repos["acme/tiny"].files


def test_a_token_that_may_not_write_makes_no_repository(hub, published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "_of_somebody_else")
    with pytest.raises(OSError, match="hf auth whoami"):
        run_publish.publish(published, run_publish.PublishArguments(str(published), "acme/tiny"))
    assert not hub.repos


def test_what_shall_be_private_does_not_go_into_a_public_repository(hub, published):
    huggingface_hub.HfApi().create_repo("acme/tiny")
    with pytest.raises(PermissionError, match="exists and is public"):
        upload(huggingface_hub.HfApi(), published, "acme/tiny", private=True)
    assert list(hub.repos["acme/tiny"].files) == [".gitattributes"]


@pytest.mark.parametrize(
    ("files", "flags", "repo_id", "message"),
    [
        ({}, [], "acme/tiny", "has no config.json"),
        ({"adapter_config.json": "{}"}, [], "acme/tiny", "LoRA adapter; give the folder of the merged model"),
        ({"config.json": '{"model_type": "llava"}'}, [], "acme/tiny", "holds a 'llava' model.*run_upcycle.py"),
        ({"config.json": "{"}, [], "acme/tiny", "config.json is no JSON"),
        ({"config.json": '{"model_type": "moevlm"}'}, [], "tiny", "must be organisation/name"),
        ({"config.json": '{"model_type": "moevlm"}'}, [], "acme/ti ny", "acme/ti ny"),
        ({"config.json": '{"model_type": "moevlm"}'}, [], "acme/tiny", "set HF_TOKEN, or try with --dry_run"),
        ({"config.json": '{"model_type": "moevlm"}'}, ["--output_dir", "."], "acme/tiny", "is not empty"),
    ],
)
def test_what_cannot_be_published_is_refused_at_once(monkeypatch, tmp_path, files, flags, repo_id, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_publish, "get_token", lambda: None)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        command(monkeypatch, tmp_path, *flags, repo_id=repo_id)


def test_a_checkpoint_without_scores_says_so_on_its_card(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(run_publish, "verify", lambda folder: None)
    unmeasured = tmp_path / "run"
    unmeasured.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "metrics.json":
            (unmeasured / path.name).symlink_to(path)
    with pytest.warns(UserWarning, match=r"no metrics.json.*run_eval.py"):
        data = ("--data", checkpoint / "mixture.yaml")
        command(monkeypatch, unmeasured, "--dry_run", "--output_dir", tmp_path / "kept", *data)
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "Not measured" in card and "model-index" not in card


def test_the_card_holds_scores_of_tasks_of_ones_own():
    own = {"ocr": METRICS["vqa"], "blind": {"ocr": METRICS["blind"]["vqa"]}, "problems": [], "run": {}}
    card = render_card(TEMPLATE, FACTS._replace(metrics=own))
    assert "| ocr | vqa_accuracy | **98.25** | 97 .. 99 | 1,200 |" in card and "vqa_accuracy (ocr)" in card
    nothing = render_card(TEMPLATE, FACTS._replace(metrics={"problems": [], "run": {}}))
    assert "Not measured: `metrics.json` holds no scores." in nothing and "model-index" not in nothing


def test_the_card_holds_every_score_with_interval_size_and_what_blindness_gives():
    card = render_card(TEMPLATE, FACTS)
    assert "| questions | vqa_accuracy | **98.25** | 97 .. 99 | 1,200 | 31.5 |" in card
    assert "VQA accuracy by answer type: colour 99, count 91." in card
    assert "| scenes | drawn pictures" in card and "600 optimizer steps in 88 s; mean loss 0.125." in card
    resumed = METRICS | {"training": METRICS["training"] | {"resumed_from": "outputs/mine/checkpoint-300"}}
    assert "600 optimizer steps.\n" in render_card(TEMPLATE, FACTS._replace(metrics=resumed))
    assert 'name, revision = "acme/tiny", "main"' in card and "# tiny\n" in card


def test_the_front_matter_is_what_the_hub_reads():
    front = yaml.safe_load(render_card(TEMPLATE, FACTS._replace(license="mit")).split("---\n")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and front["library_name"] == "transformers"
    assert {"custom_code", "moe", "vision-language"} <= set(front["tags"])
    assert front["license"] == "mit" and front["datasets"] == ["scenes"]
    (entry,) = front["model-index"]
    values = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert entry["name"] == "tiny" and values == {"vqa_accuracy": 98.25, "exact_match": 97.5}
    assert set(front["metrics"]) == set(values)


def test_the_card_tells_training_data_from_what_the_scores_were_measured_on(tmp_path):
    for name in ("scenes", "vqav2"):
        entry = {"source": name, "size": 1}
        (tmp_path / name).write_text(yaml.safe_dump({"train": [entry], "eval": [entry]}))
    trained, scored = str(tmp_path / "scenes"), str(tmp_path / "vqav2")
    metrics = METRICS | {"training": METRICS["training"] | {"data": trained}, "run": {"data": scored, "part": "eval"}}
    trained_on, scored_on = read_mixtures(None, metrics)
    front = render_card(TEMPLATE, FACTS._replace(trained_on=trained_on, scored_on=scored_on)).split("---\n")[1]
    front = yaml.safe_load(front)
    assert front["datasets"] == ["scenes"]
    assert {result["dataset"]["name"] for result in front["model-index"][0]["results"]} == {"vqav2"}


def test_the_card_names_no_local_paths_and_the_part_that_was_scored(tmp_path):
    (tmp_path / "mine.jsonl").write_text("")
    hub = {"source": "hub", "path": "org/name", "data_files": "part.parquet"}
    moved = {"source": "hub", "path": str(tmp_path / "moved")}
    entries = [{"source": "hub", "path": str(tmp_path / "mine.jsonl")}, hub, moved]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"train": entries, "eval": entries[:1]}))
    metrics = METRICS | {"training": METRICS["training"] | {"data": str(tmp_path / "mix.yaml")}}
    trained_on, scored_on = read_mixtures(None, metrics)
    card = render_card(TEMPLATE, FACTS._replace(trained_on=trained_on, scored_on=scored_on))
    front = yaml.safe_load(card.split("---\n")[1])
    assert str(tmp_path) not in card and "| mine.jsonl | files of one's own |" in card
    assert front["datasets"] == ["org/name"]
    assert {result["dataset"]["split"] for result in front["model-index"][0]["results"]} == {"eval"}


def test_a_mixture_that_is_gone_is_not_guessed():
    assert read_mixtures(None, {"training": {"data": "/gone.yaml"}}) == (None, None)
    with pytest.raises(FileNotFoundError, match="gone.yaml"):
        read_mixtures("/gone.yaml", {})


def test_a_rendered_card_is_a_template_for_another_checkpoint():
    other = CardFacts("acme/other", "mit", {"Parameters": "7"}, None, None, None)
    assert render_card(render_card(TEMPLATE, FACTS), other) == render_card(TEMPLATE, other)


def test_a_card_without_a_section_is_refused():
    with pytest.raises(ValueError, match="lacks the section <!-- results -->"):
        render_card(TEMPLATE.replace("<!-- results -->", ""), FACTS)


def test_the_card_counts_the_parameters_that_work_on_a_token(tiny):
    total = sum(parameter.numel() for parameter in tiny.parameters())
    experts = sum(parameter.numel() for name, parameter in tiny.named_parameters() if ".experts." in name)
    # Every sparse block of the tiny model sends a token to 2 of its 4 experts.
    assert describe(tiny)["Parameters"] == f"{total:,}, of which {total - experts // 2:,} work on a token"
