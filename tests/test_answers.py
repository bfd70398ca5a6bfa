# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Answers on their way to the disk, files of answers, and input that is wrong."""

import json
import logging
from types import SimpleNamespace

import pytest
from asked_records import caption, chat, vqa

from moevlm import answers_moevlm as answers
from moevlm.evaluation_moevlm import samples_from

RULES = {"idf": "0a", "normalize": "always"}


@pytest.fixture
def samples():
    records = [caption("7", ["a dog", "one dog"]), caption("8", ["a cat"]), vqa("q1", "What?", "red")]
    return samples_from([*records, chat("d", "Who?", "a dog", "Where?", "left")])


def keep(folder, samples, column="test", rank=0, places=(0, 1), said=("x", "y")):
    journal = answers.Journal(folder, rank)
    journal.add(column, samples, places, said)
    journal.close()


def test_answers_of_all_processes_and_starts_are_found_again(tmp_path, samples):
    assert answers.start(tmp_path, {"seed": 0}, resume=False) == {}
    keep(tmp_path, samples, places=[0, 1], said=["x\u2028y", "é"])
    keep(tmp_path, samples, rank=1, places=[2], said=["red"])
    keep(tmp_path, samples, rank=1, column="blind", places=[2], said=["blue"])
    known = answers.start(tmp_path, {"seed": 0}, resume=True)
    assert answers.places_of(known, "test", samples) == {0: "x\u2028y", 1: "é", 2: "red"}
    assert answers.places_of(known, "blind", samples) == {2: "blue"}


def test_a_line_that_the_kill_cut_off_is_asked_again(tmp_path, samples):
    answers.start(tmp_path, {}, resume=False)
    keep(tmp_path, samples)
    (file,) = (tmp_path / "partial").glob("*.jsonl")
    whole = file.read_text()
    for length in range(1, len(whole) - 1):
        file.write_text(whole + whole[:length])
        assert len(answers.start(tmp_path, {}, resume=True)) == 2
    keep(tmp_path, samples, places=[2], said=["red"])
    assert len(answers.start(tmp_path, {}, resume=True)) == 3, "what is appended later does not hang on the torn line"


def test_other_settings_do_not_go_on_with_old_answers(tmp_path, samples):
    answers.start(tmp_path, {"seed": 0, "num_shots": 2}, resume=False)
    with pytest.raises(ValueError, match=r"num_shots=3 \(was 2\); repeat its settings, or drop --resume"):
        answers.start(tmp_path, {"seed": 0, "num_shots": 3}, resume=True)


def test_a_fresh_start_puts_old_answers_aside(tmp_path, samples):
    for _ in range(2):
        assert answers.start(tmp_path, {}, resume=False) == {}
        keep(tmp_path, samples)
    assert list((tmp_path / "partial-old").glob("*.jsonl"))
    answers.finish(tmp_path)
    assert not (tmp_path / "partial").exists()
    assert answers.start(tmp_path, {}, resume=True) == {}, "nothing to go on with is a fresh start"


def test_settings_are_those_that_answers_depend_on(tmp_path, samples):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    args = SimpleNamespace(
        model_name_or_path=str(tmp_path), batch_size=2, num_shots=0, max_new_tokens=None, seed=0, dtype="auto"
    )
    tasks = [SimpleNamespace(name="vqa", max_new_tokens=4)]
    before = answers.settings_of(args, tasks, samples)
    assert before == json.loads(json.dumps(before)) == answers.settings_of(args, tasks, list(samples))
    assert before != answers.settings_of(args, tasks, samples[1:])
    assert before != answers.settings_of(args, [SimpleNamespace(name="vqa", max_new_tokens=5)], samples)
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert before != answers.settings_of(args, tasks, samples)


def test_duplicate_ids_and_empty_references_are_named_and_counted():
    records = [vqa("a", "?", "x"), vqa("a", "?", "y"), vqa("a", "?", "z"), caption("a", ["fine"]), caption("b", [" "])]
    kept, problems = answers.checked(samples_from(records))
    assert [(sample.task, sample.id, sample.target) for sample in kept] == [("vqa", "a", "x"), ("caption", "a", "fine")]
    assert [str(problem) for problem in problems] == [
        "2 duplicate ids: vqa a, vqa a",
        "1 samples with an empty reference: caption b",
    ]
    with pytest.raises(ValueError, match="2 duplicate ids: vqa a, vqa a; 1 samples .* --skip_bad_rows"):
        answers.settle(problems, skip=False)
    answers.settle(problems, skip=True)
    answers.settle([], skip=False)


def test_of_many_wrong_samples_a_few_are_named_and_all_are_counted():
    shown = str(answers.Problem("empty answers", [str(at) for at in range(100)]))
    assert shown == "100 empty answers: 0, 1, 2, 3, 4 and 95 more"


def test_empty_answers_are_counted(samples):
    (problem,) = answers.empty_answers(samples, ["a", " \n", "", "b", "c"])
    assert problem.ids == ["caption 8", "vqa q1"]
    assert answers.empty_answers(samples, ["a"] * 5) == []


def test_warnings_of_the_data_are_kept_for_the_results():
    with answers.warnings_of("moevlm") as notes:
        logging.getLogger("moevlm.records_moevlm").warning("left out %d bad rows", 3)
        logging.getLogger("somebody").warning("else")
    logging.getLogger("moevlm.records_moevlm").warning("too late")
    assert notes == ["left out 3 bad rows"]


def test_official_forms_are_read_by_name_or_by_their_keys(tmp_path, samples):
    captions = [{"image_id": 7, "caption": "dogs"}, {"image_id": 8, "caption": ""}]
    (tmp_path / "results.json").write_text(json.dumps(captions))
    found, problems = answers.read_answers(tmp_path / "results.json", samples)
    assert found == {("caption", "7"): "dogs", ("caption", "8"): ""}
    assert [str(problem) for problem in problems] == ["3 samples without a prediction: vqa q1, chat d#0, chat d#1"]
    (tmp_path / "predictions_vqa.json").write_text(json.dumps([{"question_id": "q1", "answer": "red"}]))
    (tmp_path / "predictions_caption.json").write_text(json.dumps(captions))
    found, _ = answers.read_answers(tmp_path, samples)
    assert found == {("caption", "7"): "dogs", ("caption", "8"): "", ("vqa", "q1"): "red"}


def test_predictions_that_do_not_fit_are_named_and_counted(tmp_path, samples):
    rows = [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}, {"image_id": 99, "caption": "c"}]
    (tmp_path / "predictions_caption.json").write_text(json.dumps(rows))
    found, problems = answers.read_answers(tmp_path, samples[:2])
    assert found == {("caption", "7"): "a"}
    assert [str(problem) for problem in problems] == [
        "1 predictions without references: caption 99",
        "1 duplicate predictions: caption 7",
        "1 samples without a prediction: caption 8",
    ]


def test_a_folders_file_of_no_asked_task_is_named_and_never_taken_for_another(tmp_path, samples):
    for name in ("vqa", "short"):
        (tmp_path / f"predictions_{name}.json").write_text(json.dumps([{"question_id": "q1", "answer": name}]))
    found, problems = answers.read_answers(tmp_path, [sample for sample in samples if sample.task == "vqa"])
    assert found == {("vqa", "q1"): "vqa"}
    assert [str(problem) for problem in problems] == ["1 files of no asked task: predictions_short.json"]


def test_predictions_none_of_which_fits_are_refused(tmp_path, samples):
    (tmp_path / "predictions_caption.json").write_text(json.dumps([{"image_id": 99, "caption": "c"}]))
    with pytest.raises(ValueError, match="no row answers any of the samples .1 predictions without ref.* caption 99"):
        answers.read_answers(tmp_path / "predictions_caption.json", samples)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([{"image_id": 7, "text": "a"}], "row 0 is .* give it 'image_id' and a text 'caption'"),
        ([{"image_id": 7, "caption": None}], "row 0 is .* give it 'image_id' and a text 'caption'"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, samples, content, complaint):
    (tmp_path / "predictions_caption.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=complaint):
        answers.read_answers(tmp_path, samples)


def test_a_file_of_no_task_or_no_file_is_explained(tmp_path, samples):
    (tmp_path / "mine.json").write_text(json.dumps([{"id": 1, "answer": "a"}]))
    with pytest.raises(ValueError, match="of no task of this data .caption, vqa, chat.; name it predictions_<task>"):
        answers.read_answers(tmp_path / "mine.json", samples)
    with pytest.raises(ValueError, match="no such file, nor a folder with predictions_<task>.json"):
        answers.read_answers(tmp_path / "nothing.json", samples)
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        answers.read_answers(tmp_path / "mine.json", samples)


def written(folder, samples, said):
    scores = [{sample.metric: 1.0} for sample in samples]
    details = [answers.detail(*each) for each in zip(samples, said, scores, strict=True)]
    answers.write(folder, samples, details, {sample.task: {"n": 1, **RULES} for sample in samples})
    return details


def test_what_is_written_is_read_again(tmp_path, samples):
    said = ["x", "y\u2028z", "red", "a dog", ""]
    details = written(tmp_path, samples, said)
    found, problems = answers.read_answers(tmp_path, samples)
    assert [found[sample.task, sample.id] for sample in samples] == said and not problems
    assert answers.read_details(tmp_path) == [each | {"rules": RULES} for each in json.loads(json.dumps(details))]
    assert [row["id"] for row in answers.read_details(tmp_path / "predictions_chat.json")] == ["d#0", "d#1"]
    assert json.loads((tmp_path / "predictions_caption.json").read_text())[0] == {"image_id": 7, "caption": "x"}
    assert json.loads((tmp_path / "predictions_vqa.json").read_text()) == [{"question_id": "q1", "answer": "red"}]
    assert not list(tmp_path.glob(".*"))


def test_a_second_run_leaves_no_answers_of_the_first_but_those_of_others(tmp_path, samples):
    (tmp_path / "predictions_theirs.json").write_text("[]")
    written(tmp_path, samples, ["a"] * 5)
    written(tmp_path, samples[:2], ["a"] * 2)
    names = sorted(path.name for path in tmp_path.glob("predictions_*.json"))
    assert names == ["predictions_caption.json", "predictions_theirs.json"]


def test_ids_that_begin_with_zeros_are_read_again(tmp_path):
    samples = samples_from([vqa("007", "What?", "red"), vqa("7", "Who?", "red")])
    written(tmp_path, samples, ["red", "blue"])
    assert [row["question_id"] for row in json.loads((tmp_path / "predictions_vqa.json").read_text())] == ["007", 7]
    assert answers.read_answers(tmp_path, samples) == ({("vqa", "007"): "red", ("vqa", "7"): "blue"}, [])


def test_answers_without_scores_say_how_to_get_them(tmp_path):
    (tmp_path / "predictions_vqa.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="score it first: run_eval.py --predictions"):
        answers.read_details(tmp_path / "predictions_vqa.json")


def test_an_idf_table_is_made_once_and_read_afterwards(tmp_path, samples):
    made = []

    def make(captions):
        made.append(captions)
        return {"images": len(captions), "counts": {"a dog": 1}}

    path = tmp_path / "new" / "idf.json"
    first = answers.idf_table(path, samples, make)
    assert first == answers.idf_table(path, [], make) == {"images": 2, "counts": {"a dog": 1}}
    assert made == [[["a dog", "one dog"], ["a cat"]]]
    with pytest.raises(ValueError, match="the train part has no captions to make it of"):
        answers.idf_table(tmp_path / "other.json", samples[2:], make)
    path.write_text("{")
    with pytest.raises(ValueError, match="idf.json: is not valid JSON"):
        answers.idf_table(path, samples, make)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.replace(path, fail)
    assert path.read_text() == "old"
