# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The scoring command: its files, its flags, its errors, its processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
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
    """Runs the command with these flags; gives the folder it wrote. Drawing is left out unless a test looks at it."""

    def run(*flags, model=checkpoint, data=mixture, folder="out", drawn=False):
        out = tmp_path / folder
        if not drawn:
            monkeypatch.setattr(run_eval.report, "plot_scores", lambda *given: {})
            monkeypatch.setattr(run_eval.report, "draw_samples", lambda samples, said, path: Path(path).touch())
        arguments = ["--model_name_or_path", model, "--data", data, "--output_dir", str(out), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["run_eval.py", *arguments, "--max_new_tokens", "3", *flags])
        run_eval.main()
        return out

    return run


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_it_writes_the_promised_files(evaluate, capsys):
    out = evaluate(drawn=True)
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
    assert not (out / "partial").exists(), "no partial answers are left"
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
    for column in ("blind", "text_only", "question_only"):
        assert scores[column]["vqa"]["n"] == 4
        assert scores[column]["caption"]["CIDEr_references"] == scores["caption"]["CIDEr_references"]
    assert "question_only" in capsys.readouterr().out


def test_examples_come_from_the_train_part_and_the_same_task(evaluate, monkeypatch):
    asked = []

    def spy(model, processor, samples, **settings):
        asked.extend(samples)
        return ["yes"] * len(samples)

    monkeypatch.setattr(run_eval.evaluation, "predict", spy)
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


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory):
    """A random SmolVLM: an Idefics3 with its own image tokens, nested pictures and a chat template of its own."""
    folder = str(tmp_path_factory.mktemp("smolvlm"))
    tokenizer = train_tokenizer(WORDS, 300)
    tokens = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    text = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids).to_dict()
    vision = {"image_size": 32, "patch_size": 8, **sizes}
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=image, scale_factor=2, pad_token_id=0
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False}
    template = (
        "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}<end_of_utterance>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**pictures), tokenizer, image_seq_len=4, chat_template=template
    )
    processor.save_pretrained(folder)
    return folder


def test_a_model_with_nested_pictures_is_scored_by_the_same_flags(evaluate, smolvlm):
    out = evaluate("--max_samples", "3", "--num_shots", "1", "--blind", model=smolvlm)
    scores = read(out, "metrics.json")
    assert scores["vqa"]["n"] == scores["blind"]["vqa"]["n"] == scores["text_only"]["vqa"]["n"] == 3


def test_only_the_asked_tasks_are_scored_and_a_new_one_is_a_file(evaluate, tmp_path):
    (tmp_path / "short.yaml").write_text(
        "reads: vqa\nmetric: turn_accuracy\nmax_new_tokens: 2\nprompt: 'In a word: {question}'\n"
    )
    out = evaluate("--tasks", "caption", str(tmp_path / "short.yaml"), "--max_samples", "4")
    scores = read(out, "metrics.json")
    assert {"caption", "short"} <= set(scores) and not {"vqa", "chat"} & set(scores)
    assert {"turn_accuracy", "token_f1", "n"} <= set(scores["short"]) and scores["short"]["n"] == 4
    assert set(read(out, "predictions_short.json")[0]) == {"question_id", "answer"}
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sum(row["question"].startswith("In a word: ") for row in rows) == 4


def test_an_unknown_task_is_refused_before_the_model_is_loaded(evaluate):
    with pytest.raises(ValueError, match="'ocr' is unknown; use caption, chat, vqa"):
        evaluate("--tasks", "ocr", model="outputs/nowhere")


def test_a_task_that_nothing_in_the_data_answers_is_refused(evaluate, tmp_path, mixture):
    parts = {"test": [{"source": "scenes", "split": "test", "size": 3, "tasks": ["vqa"]}]}
    (tmp_path / "vqa.yaml").write_text(yaml.safe_dump(parts))
    for tasks in (["caption"], ["vqa", "caption"]):
        with pytest.raises(ValueError, match="test has no record for the tasks caption$"):
            evaluate("--tasks", *tasks, data=str(tmp_path / "vqa.yaml"))


def killed_after(monkeypatch, batches):
    """Lets so many batches be answered, then dies; gives the list of batches that were asked."""
    asked, generate = [], MoeVlmForConditionalGeneration.generate

    def dying(self, **inputs):
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(len(inputs["input_ids"]))
        return generate(self, **inputs)

    monkeypatch.setattr(MoeVlmForConditionalGeneration, "generate", dying)
    return asked


@pytest.mark.parametrize("batches", [1, 7])
def test_a_killed_run_goes_on_and_asks_nothing_twice(evaluate, monkeypatch, batches):
    flags = ["--batch_size", "4", "--max_samples", "6", "--blind"]
    whole = evaluate(*flags, folder="whole")
    with monkeypatch.context() as patch:
        killed_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*flags)
    with monkeypatch.context() as patch:
        rest = killed_after(patch, 10_000)
        out = evaluate(*flags, "--resume")
    # 6 captions, questions and turns in batches of 4 and 2, once each with pictures, with noise and without any.
    assert len(rest) == 18 - batches
    for name in ("predictions_caption.json", "predictions_vqa.json", "predictions_chat.json", "samples.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    resumed, single = (read(folder, "metrics.json") for folder in (out, whole))
    assert resumed.pop("run")["resume"] and single.pop("run") and resumed == single
    assert not (out / "partial").exists()


def test_going_on_with_another_checkpoint_or_other_pictures_is_refused(
    evaluate, checkpoint, mixture, monkeypatch, tmp_path
):
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "data/mixture.yaml")}
    shutil.copytree(checkpoint, given["model"])
    shutil.copytree(Path(mixture).parent, tmp_path / "data")
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate("--batch_size", "4", **given)
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate("--batch_size", "4", "--resume", **given)
    picture = tmp_path / "data/red.png"
    kept = picture.read_bytes(), picture.stat()
    Image.new("RGB", (50, 40), "green").save(picture)
    with pytest.raises(ValueError, match=r"answers of another run: samples="):
        evaluate("--batch_size", "4", "--resume", **given)
    picture.write_bytes(kept[0])
    os.utime(picture, ns=(kept[1].st_atime_ns, kept[1].st_mtime_ns))
    (Path(given["model"]) / "generation_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"answers of another run: file generation_config.json="):
        evaluate("--batch_size", "4", "--resume", **given)


def test_going_on_with_other_settings_is_refused(evaluate, monkeypatch):
    with monkeypatch.context() as patch:
        killed_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            evaluate("--batch_size", "4")
    with pytest.raises(ValueError, match=r"batch_size=2 \(was 4\)"):
        evaluate("--batch_size", "2", "--resume")


def test_answers_of_any_program_are_scored_like_the_models_own(evaluate, tmp_path):
    own = evaluate()
    again = evaluate("--predictions", str(own), model="outputs/nowhere", folder="again")
    first, second = (read(folder, "metrics.json") for folder in (own, again))
    assert first.pop("run")["processes"] == 1 and "answers_per_second" not in second.pop("run")
    assert first == second
    assert (own / "samples.jsonl").read_bytes() == (again / "samples.jsonl").read_bytes()


def test_scoring_answers_leaves_those_of_an_interrupted_run(evaluate):
    own = evaluate("--max_samples", "2")
    run_eval.answers.start(own.parent / "again", {"seed": 0}, resume=False)
    again = evaluate("--max_samples", "2", "--predictions", str(own), folder="again")
    assert (again / "partial" / "settings.json").is_file()


def test_what_cannot_be_scored_is_said_before_the_model_is_loaded(evaluate, mixture, tmp_path):
    with pytest.raises(ValueError, match='"TER" is unknown; choose among METEOR, SPICE'):
        evaluate("--java_metrics", "TER", model="outputs/nowhere")
    content = yaml.safe_load(Path(mixture).read_text())
    content["train"][0]["tasks"] = ["vqa"]
    (tmp_path / "silent.yaml").write_text(yaml.safe_dump(content | {"test": content["train"]}))
    with pytest.raises(ValueError, match="idf.json does not exist, and the train part has no captions"):
        evaluate("--idf", str(tmp_path / "idf.json"), model="outputs/nowhere", data=str(tmp_path / "silent.yaml"))


def test_predictions_that_do_not_fit_stop_the_run_or_are_counted(evaluate, tmp_path):
    rows = [{"image_id": 101, "caption": "a red wall"}, {"image_id": 99, "caption": "what?"}]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    flags = ["--tasks", "caption", "--predictions", str(tmp_path / "results.json")]
    with pytest.raises(
        ValueError, match="1 predictions without references: caption 99; 7 samples without a prediction"
    ):
        evaluate(*flags)
    scores = read(evaluate(*flags, "--skip_bad_rows"), "metrics.json")
    assert scores["caption"]["n"] == 1
    assert scores["problems"][0] == "1 predictions without references: caption 99"
    assert scores["problems"][1].startswith("7 samples without a prediction: caption ")


def test_bad_rows_of_the_data_stop_the_run_or_are_counted(evaluate, mixture, tmp_path):
    folder = Path(mixture).parent
    content = json.loads((folder / "captions.json").read_text())
    content["images"].append({"id": 303, "file_name": "gone.png"})
    content["annotations"].append({"id": 3030, "image_id": 303, "caption": "a hole"})
    content["annotations"].append({"id": 3031, "image_id": 303, "caption": " "})
    (folder / "bad.json").write_text(json.dumps(content))
    entry = {"source": "coco_captions", "annotations": "bad.json", "images": "."}
    (folder / "bad.yaml").write_text(yaml.safe_dump({"test": [entry, {**entry, "annotations": "captions.json"}]}))
    with pytest.raises(ValueError, match=r"left out 2 bad rows(?s:.)*'caption' is ' '(?s:.)*gone.png does not exist"):
        evaluate(data=str(folder / "bad.yaml"), model="outputs/nowhere")
    scores = read(evaluate("--skip_bad_rows", data=str(folder / "bad.yaml")), "metrics.json")
    problems = "; ".join(scores["problems"])
    assert scores["caption"]["n"] == 2
    assert "left out 2 bad rows" in problems and "gone.png does not exist" in problems
    assert "2 duplicate ids: caption 101, caption 202" in problems


def test_silent_models_are_counted(evaluate, monkeypatch):
    monkeypatch.setattr(
        run_eval.evaluation, "predict", lambda model, processor, samples, **settings: [""] * len(samples)
    )
    out = evaluate("--max_samples", "2")
    assert read(out, "metrics.json")["problems"][0].startswith("6 empty answers: ")
    assert "6 empty answers" in (out / "report.html").read_text()


def test_what_a_capacity_drops_in_generation_is_counted_and_told(evaluate, checkpoint, tmp_path, capsys):
    limited = shutil.copytree(checkpoint, tmp_path / "limited")
    config = read(limited, "config.json")
    config["vision_config"]["expert_capacity_factor"] = 0.5
    (limited / "config.json").write_text(json.dumps(config))
    found = read(evaluate(model=str(limited)), "metrics.json")
    (share,) = found["run"]["dropped_visits"].values()
    assert 0.5 <= share < 1.0
    note = f"vision.1 dropped {share:.1%} of its visits for want of capacity"
    assert note in found["problems"] and f"note: {note}" in capsys.readouterr().out
    assert read(evaluate(folder="all"), "metrics.json")["run"]["dropped_visits"] == {}


def test_the_report_and_its_plots_show_every_task(evaluate):
    out = evaluate("--max_samples", "6", drawn=True)
    html = (out / "report.html").read_text()
    assert all(f"<h2>{task}</h2>" in html for task in ("caption", "vqa", "chat"))
    assert html.count("data:image/png") > 20
    names = {path.name for path in (out / "plots").iterdir()}
    assert {"caption_spread.png", "vqa_answer_type.png", "vqa_question_type.png", "chat_turn.png"} <= names
    kinds = read(out, "metrics.json")["vqa"]["by_kind"]["answer_type"]
    assert sum(kind["n"] for kind in kinds.values()) == 6


def test_an_idf_table_is_made_of_the_train_part_and_used_again(evaluate, tmp_path):
    path = tmp_path / "idf.json"
    first = read(evaluate("--tasks", "caption", "--idf", str(path)), "metrics.json")
    table = json.loads(path.read_text())
    assert table["images"] == 8 and table["counts"]
    again = read(evaluate("--tasks", "caption", "--idf", str(path)), "metrics.json")
    assert first["caption"] == again["caption"]
    path.write_text(json.dumps(table | {"images": 800}))
    other = read(evaluate("--tasks", "caption", "--idf", str(path)), "metrics.json")
    assert other["caption"]["CIDEr_references"] != first["caption"]["CIDEr_references"]


@pytest.mark.parametrize(("task", "flags"), [("caption", ["--idf", "idf.json"]), ("vqa", ["--normalize", "always"])])
def test_runs_scored_by_other_rules_are_not_compared(evaluate, task, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = ("--tasks", task, "--max_samples", "4")
    runs = [evaluate(*asked, folder="one"), evaluate(*asked, *flags, folder="two")]
    monkeypatch.setattr(sys, "argv", ["run_eval.py", "compare", *map(str, runs)])
    with pytest.raises(ValueError, match=f"{task}: {flags[0][2:]} is .* in the first run and .* in the second"):
        run_eval.main()


def test_a_train_part_that_streams_is_not_read_to_its_end(evaluate, mixture, monkeypatch, tmp_path):
    folder = shutil.copytree(Path(mixture).parent, tmp_path / "data")
    row = {"image": "red.png", "question": "What colour is it?", "answer": "red"}
    rows = [row] * 40 + [row | {"image": "missing.png"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = yaml.safe_load(Path(mixture).read_text())
    parts["train"] = [{"source": "hub", "path": "train.jsonl", "streaming": True}]
    (folder / "mixture.yaml").write_text(yaml.safe_dump(parts))
    asked = ("--tasks", "vqa", "--max_samples", "2", "--blind")
    with pytest.raises(ValueError, match="missing.png"):
        evaluate(*asked, data=str(folder / "mixture.yaml"))
    monkeypatch.setattr("moevlm.tasks_moevlm.POOL", 5)
    assert read(evaluate(*asked, data=str(folder / "mixture.yaml")), "metrics.json")["question_only"]["vqa"]["n"] == 2


def test_two_runs_are_compared(evaluate, capsys, monkeypatch, tmp_path):
    first = evaluate("--max_samples", "6", folder="first")
    said = iter(["yes"] * 100)
    monkeypatch.setattr(
        run_eval.evaluation, "predict", lambda model, processor, samples, **settings: [next(said) for _ in samples]
    )
    second = evaluate("--max_samples", "6", folder="second")
    capsys.readouterr()
    out = str(tmp_path / "comparison.json")
    monkeypatch.setattr(sys, "argv", ["run_eval.py", "compare", str(first), str(second), "--output", out])
    run_eval.main()
    printed = capsys.readouterr().out
    assert "win/tie/loss" in printed and "vqa_accuracy" in printed and "answers changed" in printed
    found = json.loads(Path(out).read_text())
    means = [read(folder, "metrics.json")["vqa"]["vqa_accuracy"] for folder in (first, second)]
    score = found["vqa"]["scores"]["vqa_accuracy"]
    assert [score["first"], score["second"]] == pytest.approx(means, abs=0.01)
    assert score["wins"] + score["ties"] + score["losses"] == 6 and len(found["vqa"]["changed"]) == 6
    monkeypatch.setattr(
        sys,
        "argv",
        ["run_eval.py", "compare", str(first / "predictions_vqa.json"), str(second / "predictions_vqa.json")],
    )
    run_eval.main()
    assert "CIDEr" not in capsys.readouterr().out


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_give_the_scores_of_one(evaluate, checkpoint, mixture, tmp_path, launcher):
    alone = evaluate("--batch_size", "4", folder="alone")
    command = [sys.executable, "-m", *launcher, str(ROOT / "run_eval.py")]
    flags = ["--model_name_or_path", checkpoint, "--data", mixture, "--output_dir", str(tmp_path / "both")]
    flags += ["--max_new_tokens", "3", "--batch_size", "4"]
    # No --device: on a machine without an accelerator the plain command must not start two runs of one process each.
    surroundings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *flags], check=True, env={**os.environ, **surroundings})
    for name in ("predictions_caption.json", "predictions_vqa.json", "predictions_chat.json"):
        assert read(tmp_path / "both", name) == read(alone, name)
    together, single = (read(folder, "metrics.json") for folder in (tmp_path / "both", alone))
    assert together.pop("run")["processes"] == 2 and single.pop("run")["processes"] == 1
    assert together == single


@pytest.mark.slow
def test_two_killed_processes_are_gone_on_with_by_one(evaluate, checkpoint, mixture, tmp_path):
    flags = ["--batch_size", "1", "--max_new_tokens", "40"]
    alone = evaluate(*flags, folder="alone")
    command = [sys.executable, "-m", *TORCHRUN, str(ROOT / "run_eval.py")]
    command += ["--model_name_or_path", checkpoint, "--data", mixture]
    command += ["--output_dir", str(tmp_path / "both"), "--device", "cpu", *flags]
    killed = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while sum(path.stat().st_size > 0 for path in (tmp_path / "both").glob("partial/answers-*.jsonl")) < 2:
            assert killed.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    lines = [path.read_text().count("\n") for path in (tmp_path / "both").glob("partial/*.jsonl")]
    out = evaluate(*flags, "--resume", folder="both")
    assert 2 <= sum(lines) < len((alone / "samples.jsonl").read_text().splitlines())
    assert (out / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()
