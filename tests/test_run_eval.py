# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The scoring command: its files, its flags, its errors, its processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from moevlm import run_eval
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer

# A few scenes and a model that says random bytes: both are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:CIDEr over", "ignore:Glyph")

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["Describe the picture.", "a red circle left of a blue square", "How many are there?", "What colour is it?"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(vocab_size=300)
    processor = build_processor(config, train_tokenizer(WORDS, 300))
    config.image_token_id = processor.image_token_id
    MoeVlmForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Six scenes to score and eight to draw examples from, and two captioned pictures in COCO's form."""
    folder = tmp_path_factory.mktemp("data")
    names = {101: "red.png", 202: "blue.png"}
    for name in names.values():
        Image.new("RGB", (20, 10), name.removesuffix(".png")).save(folder / name)
    annotations = [
        {"id": 10 * number + image, "image_id": number, "caption": f"a {names[number][:-4]} wall, said {image}"}
        for number in names
        for image in range(3)
    ]
    images = [{"id": number, "file_name": name} for number, name in names.items()]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    parts = {
        "train": [{"source": "scenes", "split": "train", "size": 8, "seed": 0}],
        "test": [
            {"source": "scenes", "split": "test", "size": 6, "seed": 0},
            {"source": "coco_captions", "annotations": "captions.json", "images": "."},
        ],
    }
    (folder / "mixture.yaml").write_text(yaml.safe_dump(parts))
    return str(folder / "mixture.yaml")


@pytest.fixture
def evaluate(checkpoint, mixture, tmp_path, monkeypatch):
    """Runs the command with these flags; gives the folder it wrote."""

    def run(*flags, model=checkpoint, data=mixture, folder="out"):
        out = tmp_path / folder
        arguments = ["--model_name_or_path", model, "--data", data, "--output_dir", str(out), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["run_eval.py", *arguments, "--max_new_tokens", "3", *flags])
        run_eval.main()
        return out

    return run


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_it_writes_the_promised_files(evaluate, capsys):
    out = evaluate()
    scores = read(out, "metrics.json")
    assert {"CIDEr", "BLEU-4", "ROUGE-L", "n", "interval_95"} <= set(scores["caption"])
    assert {"vqa_accuracy", "per_answer_type", "per_question_type", "n", "interval_95"} <= set(scores["vqa"])
    assert {"turn_accuracy", "refers_back_accuracy", "token_f1", "n", "interval_95"} <= set(scores["chat"])
    assert scores["caption"]["n"] == 8
    forms = {"caption": {"image_id", "caption"}, "vqa": {"question_id", "answer"}, "chat": {"turn_id", "answer"}}
    for task, keys in forms.items():
        rows = read(out, f"predictions_{task}.json")
        assert len(rows) == scores[task]["n"] and all(set(row) == keys for row in rows)
    assert {101, 202} <= {row["image_id"] for row in read(out, "predictions_caption.json")}
    with Image.open(out / "samples.png") as page:
        assert page.format == "PNG"
    assert not list(out.glob(".*")), "no temporary file is left"
    printed = capsys.readouterr().out
    assert "vqa_accuracy" in printed and "CIDEr" in printed and "answers a second" in printed


def test_a_second_run_replaces_the_first(evaluate):
    first = evaluate("--max_samples", "2")
    assert read(first, "metrics.json")["vqa"]["n"] == 2
    assert read(evaluate("--max_samples", "3"), "metrics.json")["vqa"]["n"] == 3


def test_max_samples_are_the_same_for_every_run(evaluate):
    names = [
        [[row["question_id"] for row in read(evaluate("--max_samples", "3", *flags), "predictions_vqa.json")]]
        for flags in ([], ["--batch_size", "2"], ["--seed", "1"])
    ]
    assert names[0] == names[1] != names[2]


def test_blind_answers_and_the_floor_stand_beside(evaluate, capsys):
    scores = read(evaluate("--blind", "--max_samples", "4"), "metrics.json")
    for column in ("blind", "question_only"):
        assert scores[column]["vqa"]["n"] == 4
        assert scores[column]["caption"]["CIDEr_references"] == scores["caption"]["CIDEr_references"]
    assert "question_only" in capsys.readouterr().out


def test_examples_come_from_the_train_part_and_the_same_task(evaluate, monkeypatch):
    asked = []

    def spy(model, processor, samples, **settings):
        asked.extend(samples)
        return ["yes"] * len(samples)

    monkeypatch.setattr(run_eval, "predict", spy)
    evaluate("--num_shots", "2", "--max_samples", "4")
    assert asked and all(sample.num_images == len(sample.images) == 3 for sample in asked)
    captions = [sample for sample in asked if sample.task == "caption"]
    assert captions and all(
        [turn["content"][-1]["text"] for turn in sample.prompt[0::2]] == [sample.question] * 3 for sample in captions
    )


def test_few_shot_prompts_are_answered(evaluate):
    assert read(evaluate("--num_shots", "2", "--max_samples", "2"), "metrics.json")["run"]["num_shots"] == 2


def test_more_examples_than_pictures_is_refused(evaluate):
    with pytest.raises(ValueError, match="num_shots=9 exceeds the 8 other pictures"):
        evaluate("--num_shots", "9", "--max_samples", "1")


def test_a_missing_model_is_named(evaluate):
    with pytest.raises(OSError, match="model_name_or_path=outputs/nowhere: no folder with a config.json"):
        evaluate(model="outputs/nowhere")


def test_a_model_that_cannot_see_is_refused(evaluate, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="holds a 'llama' model, which does not turn images and text into text"):
        evaluate(model=str(tmp_path / "llama"))


def test_a_foreign_model_is_scored_by_the_same_call(evaluate, tmp_path):
    tokenizer = train_tokenizer(WORDS, 300)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=32, patch_size=16, **sizes),
            text_config=LlamaConfig(vocab_size=300, **sizes, pad_token_id=0, eos_token_id=1),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "llava")
    out = evaluate("--max_samples", "3", model=str(tmp_path / "llava"))
    assert read(out, "metrics.json")["vqa"]["n"] == 3


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_eval.replace(path, fail)
    assert path.read_text() == "old"


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(evaluate, checkpoint, mixture, tmp_path):
    alone = evaluate("--batch_size", "4", folder="alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--model_name_or_path", checkpoint, "--data", mixture, "--output_dir", str(tmp_path / "both")]
    flags += ["--device", "cpu", "--max_new_tokens", "3", "--batch_size", "4"]
    subprocess.run(
        [*torchrun, str(ROOT / "run_eval.py"), *flags], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    for name in ("predictions_caption.json", "predictions_vqa.json", "predictions_chat.json"):
        assert read(tmp_path / "both", name) == read(alone, name)
    together, single = (read(folder, "metrics.json") for folder in (tmp_path / "both", alone))
    assert together.pop("run")["processes"] == 2 and single.pop("run")["processes"] == 1
    assert together == single
