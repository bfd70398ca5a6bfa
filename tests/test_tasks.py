# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Tasks as files, the words of a question, the samples that are drawn, and worked examples."""

from pathlib import Path

import pytest
import yaml
from asked_records import COLOURS, caption, chat, vqa

from moevlm.evaluation_moevlm import MAX_NEW_TOKENS, METRICS, samples_from
from moevlm.tasks_moevlm import TAKEN, EvalArguments, draw, load_tasks, with_examples

TASKS = Path(__file__).resolve().parent.parent / "configs" / "tasks"


def write_task(folder, name="ocr", **changes):
    values = {"reads": "vqa", "metric": "vqa_accuracy", "max_new_tokens": 4, "prompt": "Read: {question}"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (values | changes).items() if value is not None}))
    return str(path)


@pytest.mark.parametrize(
    "device, accelerator, expected", [(None, False, True), (None, True, False), ("cpu", True, True)]
)
def test_the_cpu_answers_where_asked_or_where_nothing_else_is(monkeypatch, device, accelerator, expected):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    assert EvalArguments(device=device).on_cpu is expected


@pytest.mark.parametrize("given", ["mine", "mine/predictions_vqa.json", "other/../mine"])
def test_predictions_are_not_written_over(given):
    with pytest.raises(ValueError, match=f"predictions={given} lies in output_dir=mine, .* give another output_dir"):
        EvalArguments(predictions=given, output_dir="mine")
    assert EvalArguments(predictions="mine/theirs/predictions_vqa.json", output_dir="mine").predictions


@pytest.mark.parametrize(
    "flags", [{"batch_size": 0}, {"num_shots": -1}, {"max_samples": 0}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_a_number_below_its_bound_is_named(flags):
    ((name, value),) = flags.items()
    with pytest.raises(ValueError, match=f"{name}={value} is too small; give at least {value + 1}"):
        EvalArguments(**flags)


def test_the_tasks_of_the_repository_ask_as_training_scores():
    tasks = load_tasks([], TASKS)
    assert {task.name for task in tasks} == {"caption", "vqa", "chat"}
    for task in tasks:
        assert task.reads == task.name and task.prompt == "{question}"
        assert task.metric == METRICS[task.name] and task.max_new_tokens == MAX_NEW_TOKENS[task.name]


@pytest.mark.parametrize("name", TAKEN)
def test_a_task_does_not_take_another_entrys_name(tmp_path, name):
    path = write_task(tmp_path, name)
    with pytest.raises(ValueError, match=f"metrics.json has something else under {name}; rename the file"):
        load_tasks([path], TASKS)


def test_only_the_named_tasks_are_loaded_in_the_order_of_their_names():
    assert [task.name for task in load_tasks(["vqa", "caption"], TASKS)] == ["vqa", "caption"]


def test_a_new_task_is_a_file(tmp_path):
    (task,) = load_tasks([write_task(tmp_path)], TASKS)
    records = [vqa("q", "what {x} is it?", "red"), caption("c", ["a"]), chat("d", "what", "b")]
    (sample,) = task.samples(samples_from(records))
    assert (sample.task, sample.metric, sample.target) == ("ocr", "vqa_accuracy", "red")
    assert sample.question == "Read: what {x} is it?"
    assert sample.num_images == 1 and sample.prompt[-1]["content"][0]["type"] == "image"


def test_only_the_last_turn_of_a_dialogue_is_put_in_the_words_of_the_task(tmp_path):
    (task,) = load_tasks([write_task(tmp_path, reads="chat", metric="turn_accuracy")], TASKS)
    _, second = task.samples(samples_from([chat("d", "What?", "a dog", "Where?", "left")]))
    said = [message["content"][-1]["text"] for message in second.prompt]
    assert said == ["What?", "a dog", "Read: Where?"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"promt": "x"}, "unknown 'promt' .did you mean 'prompt'"),
        ({"reads": "ocr"}, "reads: unknown 'ocr'; known: caption, vqa, chat"),
        ({"metric": "bleu"}, "metric: unknown 'bleu'; known: CIDEr, vqa_accuracy, turn_accuracy"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'; it must be int"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give at least 1"),
        ({"metric": None, "reads": None}, "lacks metric, reads"),
    ],
)
def test_a_wrong_task_file_is_explained(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        load_tasks([write_task(tmp_path, **changes)], TASKS)
    assert "ocr.yaml" in str(error.value)


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'ocr' is unknown; use caption, chat, vqa"):
        load_tasks(["caption", "ocr"], TASKS)


def test_a_task_is_not_asked_twice(tmp_path):
    with pytest.raises(ValueError, match="vqa is asked for twice"):
        load_tasks(["vqa", write_task(tmp_path, name="vqa")], TASKS)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="holds .'a'.; give it the keys reads"):
        load_tasks([str(tmp_path / "bad.yaml")], TASKS)


def test_so_many_samples_of_each_task_are_drawn_and_keep_their_order():
    records = [vqa(f"q{at}", "?", "a") for at in range(20)] + [caption(f"c{at}", ["a"]) for at in range(3)]
    samples = samples_from(records)
    drawn = draw(samples, 5, 0)
    assert [sample.task for sample in drawn] == ["vqa"] * 5 + ["caption"] * 3
    places = [int(sample.id[1:]) for sample in drawn[:5]]
    assert places == sorted(places) and drawn == draw(samples, 5, 0) != draw(samples, 5, 1)
    assert draw(samples, None, 0) == samples


def test_worked_examples_stand_before_the_question_and_never_show_its_picture():
    (asked,) = samples_from([vqa("asked", "What is it?", "green", "green")])
    pool = samples_from([vqa(f"p{at}", f"Is it {colour}?", "yes", colour) for at, colour in enumerate(COLOURS)] * 2)
    (shown,) = with_examples([asked], pool, 2)
    texts = [turn["content"][-1]["text"] for turn in shown.prompt]
    assert sorted(texts[:4]) == ["Is it blue?", "Is it red?", "yes", "yes"]
    assert texts[1] == texts[3] == "yes" and texts[4] == "What is it?"
    colours = [image.getpixel((0, 0)) for image in shown.images]
    assert sorted(colours[:2]) == [COLOURS["blue"], COLOURS["red"]] and colours[2] == COLOURS["green"]
    assert shown.num_images == 3 and shown.target == "green"


def test_examples_depend_on_the_seed_and_the_sample_but_not_on_its_company():
    pool = samples_from([vqa(f"p{at}", f"question {at}", "yes", name) for at, name in enumerate([*COLOURS] * 9)])
    samples = samples_from([vqa(f"q{at}", "What is it?", "x", "red") for at in range(8)])
    together = with_examples(samples, pool, 2)
    assert [with_examples([sample], pool, 2)[0].prompt for sample in samples] == [shown.prompt for shown in together]
    assert len({str(shown.prompt) for shown in together}) > 4
    assert [shown.prompt for shown in with_examples(samples, pool, 2, seed=1)] != [shown.prompt for shown in together]


def test_examples_are_of_the_same_task():
    pool = samples_from([vqa("p", "Is it?", "yes", "blue"), caption("c", ["a red wall"])])
    samples = samples_from([vqa("q", "What is it?", "green", "green"), caption("d", ["x"])])
    samples[1] = samples[1]._replace(read_images=samples[0].read_images)
    first, second = with_examples(samples, pool, 1)
    assert [shown.prompt[1]["content"][0]["text"] for shown in (first, second)] == ["yes", "a red wall"]


def test_a_system_message_is_said_once_and_first():
    record = vqa("q", "What is it?", "green", "green")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    record["messages"] = [system, *record["messages"]]
    pool = samples_from([record | {"id": "p", "images": vqa("p", "?", "a", "blue")["images"]}])
    (shown,) = with_examples(samples_from([record]), pool, 1)
    assert [message["role"] for message in shown.prompt] == ["system", "user", "assistant", "user"]


def test_too_few_pictures_for_the_examples_are_counted():
    samples = samples_from([vqa("asked", "What is it?", "green", "green")])
    pool = samples_from([vqa("same", "What is it?", "green", "green"), vqa("other", "What is it?", "red", "red")])
    with pytest.raises(ValueError, match="num_shots=2 exceeds the 1 other pictures"):
        with_examples(samples, pool, 2)
