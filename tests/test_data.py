# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Data: every source becomes the record form, every mistake is named with its place, and the cache is never stale."""

import importlib.util
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import yaml
from PIL import Image

from moevlm import answers_moevlm as answers
from moevlm import records_moevlm, scenes_moevlm
from moevlm.data_moevlm import DataArguments, load_mixture, mixture_parts
from moevlm.dialogues_moevlm import dialogue
from moevlm.evaluation_moevlm import samples_from
from moevlm.records_moevlm import Rows
from moevlm.sources_moevlm import EasyVqa

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # `datasets` waits five seconds where streams of parquet files end (apache/arrow issue 45214).
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)
    datasets.disable_progress_bars()


@pytest.fixture
def builds(monkeypatch):
    """Count how often records are built rather than taken from the cache."""
    counted = []
    looked = records_moevlm._stored_records
    monkeypatch.setattr(
        records_moevlm, "_stored_records", lambda *args, **kwargs: counted.append(1) or looked(*args, **kwargs)
    )
    return counted


@pytest.fixture
def photos(tmp_path):
    """Four pictures with COCO's names, in a folder beside the mixture."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 5):
        noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"COCO_train2014_{number:012d}.jpg")
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def mixture(tmp_path, *entries, part="train", **others):
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({part: list(entries), **others}))
    return path


def load(tmp_path, *entries, part="train", grouped=False, **options):
    return load_mixture(mixture(tmp_path, *entries, part=part), part, grouped=grouped, **options)


def texts(record):
    """Give (role, text), with <image> where the picture stands."""
    return [
        (m["role"], "".join("<image>" if part["type"] == "image" else part["text"] for part in m["content"]))
        for m in record["messages"]
    ]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def captions(tmp_path, photos):
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg"} for n in (1, 2)]
    rows = [{"image_id": n, "id": 10 * n + i, "caption": f" caption {i} of {n}\n"} for n in (1, 2) for i in range(3)]
    write(tmp_path / "captions.json", {"images": images, "annotations": rows})
    return {"source": "coco_captions", "annotations": "captions.json", "images": "images"}


def change(path, change):
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def test_coco_captions_are_scored_with_all_references(tmp_path, captions):
    record = load(tmp_path, captions)[0]
    assert record["references"] == ["caption 0 of 1", "caption 1 of 1", "caption 2 of 1"]
    assert texts(record) == [("user", "<image>Describe the picture."), ("assistant", "caption 0 of 1")]
    assert (record["id"], record["task"], record["answers"]) == ("1", "caption", None)
    assert record["images"][0].size == (32, 24)


def test_coco_captions_of_a_picture_are_learned_as_turns_of_one_record(tmp_path, captions):
    records = load(tmp_path, captions | {"prompt": "What is it?"}, grouped=True)
    assert len(records) == 2
    assert [text for _, text in texts(records[1])] == [
        "<image>What is it?", "caption 0 of 2", "What is it?", "caption 1 of 2", "What is it?", "caption 2 of 2"
    ]  # fmt: skip
    assert len(records[1]["images"]) == 1


def test_pictures_on_disk_are_kept_as_paths(tmp_path, captions, photos):
    stored = load(tmp_path, captions).cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert stored[0]["images"] == [{"path": str(photos / "COCO_train2014_000000000001.jpg"), "bytes": None}]


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda c: c["annotations"][4].update(caption=" "), ValueError, r"annotations\[4\]: 'caption' is ' '"),
        (lambda c: c["annotations"][1].update(image_id=77), ValueError, r"annotations\[1\]: image_id 77 is not among"),
        (lambda c: c["annotations"].clear(), ValueError, r"images\[0\]: image 1 has no caption; add one"),
        (lambda c: c["images"][1].update(file_name="no.jpg"), FileNotFoundError, r"images\[1\]: .*no\.jpg does not"),
        (lambda c: c["images"].append(c["images"][0]), ValueError, r"images\[2\]: image 1 stands twice"),
        (lambda c: c.pop("annotations"), ValueError, r"captions\.json: has no list 'annotations'"),
    ],
)
def test_a_bad_coco_row_is_named(tmp_path, captions, damage, error, message):
    change(tmp_path / "captions.json", damage)
    with pytest.raises(error, match=message):
        load(tmp_path, captions)


@pytest.mark.parametrize("name", ["COCO_train2014_000000000002.jpg", "2.png"])
def test_a_truncated_picture_is_found_at_the_start(tmp_path, captions, photos, name):
    change(tmp_path / "captions.json", lambda c: c["images"][1].update(file_name=name))
    truncate(photos / name)
    with pytest.raises(ValueError, match=rf"captions\.json: images\[1\]: .*{name} does not open .*skip_bad_rows"):
        load(tmp_path, captions)


def test_skipped_rows_are_counted_and_reported_also_from_the_cache(tmp_path, captions, photos, caplog, builds):
    truncate(photos / "COCO_train2014_000000000002.jpg")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            records = load(tmp_path, captions, skip_bad_rows=True)
        assert [record["id"] for record in records] == ["1"]
        assert "left out 1 bad rows" in caplog.text and "images[1]" in caplog.text
    assert len(builds) == 1


def test_a_repaired_picture_is_no_longer_skipped(tmp_path, captions, photos):
    broken = photos / "COCO_train2014_000000000002.jpg"
    whole = broken.read_bytes()
    truncate(broken)
    assert len(load(tmp_path, captions, skip_bad_rows=True)) == 1
    broken.write_bytes(whole)
    assert len(load(tmp_path, captions, skip_bad_rows=True)) == 2


def test_a_picture_that_breaks_after_the_first_load_is_found(tmp_path, captions, photos):
    load(tmp_path, captions)
    truncate(photos / "COCO_train2014_000000000002.jpg")
    with pytest.raises(ValueError, match="does not open"):
        load(tmp_path, captions)


def test_when_every_row_is_bad_skipping_is_an_error(tmp_path, captions, photos):
    for path in photos.iterdir():
        truncate(path)
    with pytest.raises(ValueError, match=r"train\[0\]: gives no usable record: .*images\[0\]"):
        load(tmp_path, captions, skip_bad_rows=True)


@pytest.fixture
def vqa(tmp_path, photos):
    asked = [(11, 1, "what is it?"), (12, 2, "is it red?"), (13, 1, "how many?")]
    questions = [{"question_id": id, "image_id": image, "question": text} for id, image, text in asked]
    rows = [
        {
            "question_id": id,
            "image_id": image,
            "question_type": text.split()[0],
            "answer_type": "other",
            "multiple_choice_answer": "cat",
            "answers": [{"answer": "cat" if n < 7 else "dog", "answer_id": n} for n in range(10)],
        }
        for id, image, text in reversed(asked)
    ]
    write(tmp_path / "q.json", {"questions": questions, "data_subtype": "train2014"})
    write(tmp_path / "a.json", {"annotations": rows})
    return {"source": "vqav2", "questions": "q.json", "annotations": "a.json", "images": "images"}


def test_vqav2_is_scored_one_question_a_record_with_ten_answers(tmp_path, vqa):
    records = load(tmp_path, vqa)
    assert sorted(records["id"]) == ["11", "12", "13"]
    record = next(one for one in records if one["id"] == "12")
    assert record["answers"] == ["cat"] * 7 + ["dog"] * 3
    assert texts(record)[1] == ("assistant", "cat")
    assert {one["question_type"] for one in records} == {"what", "is", "how"}


def test_vqav2_questions_on_one_picture_are_learned_as_turns_of_one_record(tmp_path, vqa):
    records = load(tmp_path, vqa, grouped=True)
    assert [record["id"] for record in records] == ["1", "2"]
    assert [text for _, text in texts(records[0])] == ["<image>what is it?", "cat", "how many?", "cat"]


def test_vqav2_without_a_chosen_answer_learns_the_most_common(tmp_path, vqa):
    change(tmp_path / "a.json", lambda c: [row.pop("multiple_choice_answer") for row in c["annotations"]])
    assert texts(load(tmp_path, vqa)[0])[1] == ("assistant", "cat")


def test_vqav2_counts_an_annotator_who_gave_no_answer(tmp_path, vqa):
    def leave_out(content):
        for row in content["annotations"]:
            del row["multiple_choice_answer"]
            row["answers"] = [{"answer": ""}] * 8 + [{"answer": "cat"}] * 2

    change(tmp_path / "a.json", leave_out)
    record = load(tmp_path, vqa)[0]
    assert record["answers"] == [""] * 8 + ["cat"] * 2 and texts(record)[1] == ("assistant", "cat")
    kept, problems = answers.checked(samples_from([record]))
    assert len(kept) == 1 and not problems


@pytest.mark.parametrize(
    "file, damage, error, message",
    [
        (
            "a.json",
            lambda c: c["annotations"].pop(0),
            ValueError,
            r"q\.json: questions\[2\]: question_id 13 has no ans",
        ),
        (
            "a.json",
            lambda c: c["annotations"][1].update(answers=[]),
            ValueError,
            r"a\.json: annotations\[1\]: has no a",
        ),
        (
            "a.json",
            lambda c: c["annotations"].append(c["annotations"][0]),
            ValueError,
            r"a\.json: annotations\[3\]: question_id 13 stands twice",
        ),
        ("q.json", lambda c: c["questions"][1].pop("question"), ValueError, r"questions\[1\]: 'question' is None"),
        ("q.json", lambda c: c["questions"][1].update(image_id=99), FileNotFoundError, r"questions\[1\].*000099\.jpg"),
    ],
)
def test_a_bad_vqav2_row_is_named(tmp_path, vqa, file, damage, error, message):
    change(tmp_path / file, damage)
    with pytest.raises(error, match=message):
        load(tmp_path, vqa)


@pytest.mark.parametrize("harm", [truncate, os.unlink])
def test_every_question_on_an_unusable_picture_is_skipped(tmp_path, vqa, photos, harm, caplog):
    for name in ("COCO_train2014_000000000001.jpg", "1.png"):
        harm(photos / name)
    with caplog.at_level(logging.WARNING):
        records = load(tmp_path, vqa, skip_bad_rows=True)
    assert [record["id"] for record in records if record["images"][0]] == ["12"]
    assert "left out 2 bad rows" in caplog.text


def test_a_missing_vqav2_picture_that_arrives_is_used(tmp_path, vqa, photos):
    late = photos / "COCO_train2014_000000000002.jpg"
    content = late.read_bytes()
    late.unlink()
    (photos / "2.png").unlink()
    assert len(load(tmp_path, vqa, skip_bad_rows=True)) == 2
    late.write_bytes(content)
    assert len(load(tmp_path, vqa, skip_bad_rows=True)) == 3


def lines(tmp_path, *rows):
    return write(
        tmp_path / "chat.jsonl", "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )


def said(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents)]


CHAT = {"source": "chat", "path": "chat.jsonl", "images": "images"}


def test_chat_takes_marked_strings_and_lists(tmp_path, photos):
    listed = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "this"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "two"},
    ]
    lines(
        tmp_path,
        {
            "id": "a",
            "images": ["1.png"],
            "messages": said("<image>\nwhat?", "x", "and?", "y"),
            "refers_back": [False, True],
        },
        "\n",
        {"id": None, "images": ["1.png", "2.png"], "messages": listed},
        {"messages": said("hi", "ho")},
    )
    records = load(tmp_path, CHAT)
    assert texts(records[0]) == [("user", "<image>what?"), ("assistant", "x"), ("user", "and?"), ("assistant", "y")]
    assert records[0]["refers_back"] == [False, True]
    assert texts(records[1]) == [("system", "be brief"), ("user", "this<image><image>"), ("assistant", "two")]
    assert [len(record["images"]) for record in records] == [1, 2, 0]
    assert [record["id"] for record in records] == ["a", "chat.jsonl-3", "chat.jsonl-4"]
    assert {record["task"] for record in records} == {"chat"}


@pytest.mark.parametrize(
    "row, error, message",
    [
        ("{not json\n", ValueError, r"line 2: is not valid JSON"),
        ("[1]\n", ValueError, r"line 2: holds \[1\]"),
        ({"messages": said("only a question")}, ValueError, r"line 2: has the roles \['user'\].*answer last"),
        ({"messages": []}, ValueError, r"line 2: has no list 'messages'"),
        ({"messages": said("q", "")}, ValueError, r"line 2: has a message with the content ''"),
        ({"messages": [{"content": "x"}]}, ValueError, r"line 2: 'role' is None"),
        ({"images": ["1.png"], "messages": said("q", "a")}, ValueError, r"has 1 images but 0 <image> markers"),
        ({"messages": said("<image>q", "a")}, ValueError, r"has 0 images but 1 <image> markers"),
        ({"images": "1.png", "messages": said("<image>q", "a")}, ValueError, r"line 2: 'images' is '1.png'"),
        (
            {"images": ["9.png"], "messages": said("<image>q", "a")},
            FileNotFoundError,
            r"line 2: .*9\.png does not exist",
        ),
        ({"images": ["1.png"], "messages": said("q", "<image>a")}, ValueError, r"a picture outside the user's turns"),
        ({"messages": said([{"type": "text", "text": "<image>?"}], "a")}, ValueError, r"line 2: has <image> in a text"),
        ({"messages": said([{"type": "audio"}], "a")}, ValueError, r"part of type 'audio'; only 'image' and 'text'"),
        ({"messages": said("q", "a"), "refers_back": [True, True]}, ValueError, r"has 1 answers but 'refers_back'"),
    ],
)
def test_a_bad_chat_line_is_named_or_skipped(tmp_path, photos, row, error, message):
    lines(tmp_path, {"messages": said("q", "a")}, row, {"messages": said("p", "b")})
    with pytest.raises(error, match=message):
        load(tmp_path, CHAT)
    assert len(load(tmp_path, CHAT, skip_bad_rows=True)) == 2


@pytest.fixture
def parquet(tmp_path, photos):
    """A local parquet file with encoded pictures and VQAv2's answers."""
    table = datasets.Dataset.from_dict(
        {
            "img": [str(photos / f"{n}.png") for n in (1, 2, 3)],
            "q": ["a?", "b?", "c?"],
            "a": [[{"answer": "x"}, {"answer": "y"}, {"answer": "y"}]] * 3,
        }
    ).cast_column("img", datasets.Image())
    table.to_parquet(tmp_path / "table.parquet")
    return {"source": "hub", "path": "table.parquet", "columns": {"image": "img", "question": "q", "answers": "a"}}


def test_hub_reads_a_local_parquet_file(tmp_path, parquet, photos):
    records = load(tmp_path, parquet)
    assert [texts(record) for record in records][1] == [("user", "<image>b?"), ("assistant", "y")]
    assert records[0]["answers"] == ["x", "y", "y"]
    assert (records[0]["id"], records[0]["task"]) == ("table.parquet-train-0", "vqa")
    assert np.array_equal(np.array(records[2]["images"][0]), np.array(Image.open(photos / "3.png")))


def table(path, **columns):
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_image_marker_in_a_question_is_a_bad_row(tmp_path, photos):
    table(tmp_path / "q.jsonl", image=["images/1.png"] * 2, question=["a?", "<image>\nb?"], answer=["x", "y"])
    entry = {"source": "hub", "path": "q.jsonl"}
    with pytest.raises(ValueError, match="q.jsonl: row 1: has <image> in a text, .* take it out"):
        load(tmp_path, entry)
    assert len(load(tmp_path, entry, skip_bad_rows=True)) == 1


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
def test_a_cell_of_a_csv_may_hold_a_list(tmp_path, photos, write):
    rows = [["it's red", "blue", "", "red"], [{"answer": "left"}, {"answer": "right"}], "[sic]", "[blank]"]
    cells = [row if isinstance(row, str) else write(row) for row in rows]
    pandas.DataFrame({"image": "images/1.png", "question": "a?", "answers": cells}).to_csv(tmp_path / "q.csv")
    found = [record["answers"] for record in load(tmp_path, {"source": "hub", "path": "q.csv"})]
    assert found == [["it's red", "blue", "red"], ["left", "right"], ["[sic]"] * 10, ["[blank]"] * 10]
    chat = [write(said("q <image>", "a")), write(["images/1.png"])]
    pandas.DataFrame([chat], columns=["messages", "images"]).to_csv(tmp_path / "chat.csv")
    (record,) = load(tmp_path, {"source": "hub", "path": "chat.csv"})
    assert record["messages"][1]["content"][0]["text"] == "a" and len(record["images"]) == 1
    pandas.DataFrame({"image": "images/1.png", "captions": ["['a' 'b']"]}).to_csv(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="row 0: has .* begins like a list and is none; write it as JSON"):
        load(tmp_path, {"source": "hub", "path": "c.csv"})


def test_cells_of_a_csv_are_taken_as_they_are_written(tmp_path, photos):
    (tmp_path / "q.csv").write_text(
        "id,image,question,answer\n007,images/1.png,a?,1.50\n,images/1.png,b?,None\n3,images/1.png,c?,true\n"
    )
    records = load(tmp_path, {"source": "hub", "path": "q.csv"})
    found = [(record["id"], record["answers"][0]) for record in records]
    assert found == [("007", "1.50"), ("q.csv-train-1", "None"), ("3", "true")]
    records = load(tmp_path, {"source": "hub", "path": "csv", "data_files": ["q.csv"]})
    assert [record["answers"][0] for record in records] == ["1.50", "None", "true"]


@pytest.mark.parametrize("start", ["", "\n"])
def test_a_csv_with_the_index_of_a_data_frame_or_an_empty_first_line_loads(tmp_path, photos, start):
    (tmp_path / "q.csv").write_text(start + ",image,question,answer\n0,images/1.png,a?,07\n")
    assert [one["answers"][0] for one in load(tmp_path, {"source": "hub", "path": "q.csv"})] == ["07"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "q.jsonl",
            '{"image": "images/1.png", "question": "a?", "answer": "x"}\n{"image"',
            "q.jsonl does not load: .*",
        ),
        ("q.tsv", "image\tquestion\n", "q.tsv is of no kind that is read; known are .parquet"),
        ("q.csv", "", "q.csv does not load: No columns to parse from file"),
        ("q.csv", "image,question,answer\n,a?,x\n", "has 0 pictures, and a vqa row needs one"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, photos, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"train\[0\].*{message}"):
        load(tmp_path, {"source": "hub", "path": name})


def test_a_single_picture_of_a_chat_may_stand_under_image(tmp_path, photos):
    lines(tmp_path, {"image": "1.png", "messages": said("<image>what?", "a cat")})
    assert len(load(tmp_path, CHAT)[0]["images"]) == 1
    lines(tmp_path, {"image": "1.png", "messages": said("what?", "a cat")})
    with pytest.raises(ValueError, match="has 1 images but 0 <image> markers"):
        load(tmp_path, CHAT)


def test_whole_numbers_of_a_column_with_fractions_stay_whole(tmp_path, photos):
    table(tmp_path / "q.jsonl", id=[1, 2.5], image=["images/1.png"] * 2, question=["a?", "b?"], answer=[3, 0.5])
    records = load(tmp_path, {"source": "hub", "path": "q.jsonl"})
    assert [(record["id"], record["answers"][0]) for record in records] == [("1", "3"), ("2.5", "0.5")]


def test_rows_without_ids_get_some_that_no_other_file_has(tmp_path, photos):
    for folder in ("easy", "hard"):
        table(tmp_path / folder / "t.jsonl", image=["../images/1.png"], question=["a?"], answer=["x"], id=[None])
        (tmp_path / folder / "c.jsonl").write_text(json.dumps({"id": None, "messages": said("q", "a")}))
    entries = [{"source": "hub", "path": f"{folder}/t.jsonl"} for folder in ("easy", "hard")]
    entries += [CHAT | {"path": f"{folder}/c.jsonl"} for folder in ("easy", "hard")]
    assert load(tmp_path, *entries)["id"] == [
        "easy/t.jsonl-train-0", "hard/t.jsonl-train-0", "easy/c.jsonl-1", "hard/c.jsonl-1"
    ]  # fmt: skip


def test_the_first_records_of_each_stream(tmp_path, parquet):
    lines(tmp_path, {"messages": said("q", "a")}, {"messages": said("q", "a")})
    entries = [{"source": "hub", "path": "chat.jsonl", "streaming": True}, parquet | {"streaming": True}]
    entries.append({"source": "scenes", "size": 3, "tasks": ["caption"]})
    tasks = [record["task"] for record in load(tmp_path, *entries, part="test", most_of_a_stream=1)]
    assert tasks == ["chat", "vqa", "caption"]
    assert sum(1 for _ in load(tmp_path, *entries, part="test", most_of_a_stream=9)) == 2 + 3 + 3
    assert sum(1 for _ in load(tmp_path, *entries, most_of_a_stream=4)) == 4  # for training, of all together
    assert sum(1 for _ in load(tmp_path, entries[0], most_of_a_stream=1)) == 1


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "chat.jsonl").write_bytes('{"messages": "é"}'.encode("latin-1"))
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="chat.jsonl: is not UTF-8"):
        load(tmp_path, CHAT)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_streamed_source_gives_the_same_records(tmp_path, parquet, grouped):
    stored = list(load(tmp_path, parquet, grouped=grouped))
    stream = load(tmp_path, parquet | {"streaming": True}, grouped=grouped)
    assert isinstance(stream, datasets.IterableDataset)
    streamed = list(stream)
    for one, other in zip(stored, streamed, strict=True):
        assert texts(one) == texts(other)
        assert {key: one[key] for key in ("answers", "id", "task")} == {
            key: other[key] for key in ("answers", "id", "task")
        }
        assert np.array_equal(np.array(one["images"][0]), np.array(other["images"][0]))


def test_hub_reads_a_folder_of_pictures_with_captions(tmp_path, photos):
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in (1, 2, 3, 4)]
    for path in photos.glob("*.jpg"):
        path.unlink()
    write(photos / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    entry = {"source": "hub", "path": "images", "columns": {"image": "image", "caption": "text"}}
    records = load(tmp_path, entry)
    assert sorted(record["references"][0] for record in records) == [f"number {n}" for n in (1, 2, 3, 4)]
    assert records[0]["task"] == "caption"


def test_hub_reads_json_rows_with_relative_pictures_under_our_own_names(tmp_path, photos):
    rows = [{"image": f"images/{n}.png", "captions": [f"a {n}", f"the {n}"]} for n in (1, 2)]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    records = load(tmp_path, {"source": "hub", "path": "rows.jsonl"}, grouped=True)
    assert [text for role, text in texts(records[1]) if role == "assistant"] == ["a 2", "the 2"]


def test_hub_takes_a_builder_with_data_files_beside_the_mixture(tmp_path, parquet):
    entry = parquet | {"path": "parquet", "data_files": "table.parquet"}
    assert len(load(tmp_path, entry)) == 3


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"path": "./nowhere.parquet"},
            FileNotFoundError,
            r"train\[0\]: .*nowhere\.parquet does not exist; paths are rel",
        ),
        ({"columns": {"imge": "img"}}, ValueError, r"columns: unknown 'imge' \(did you mean 'image'\?\)"),
        (
            {"columns": {"image": "imag"}},
            ValueError,
            r"columns: image: unknown 'imag' \(did you mean 'img'\?\); known: img",
        ),
        ({"columns": {"image": "img"}}, ValueError, r"no column to learn from; .*the data set has img, q, a"),
        ({"task": "chat"}, ValueError, r"no column to learn from"),
        ({"path": "csv", "data_files": []}, ValueError, r"train\[0\]: data_files is \[\]; name a file"),
    ],
)
def test_a_bad_hub_entry_says_what_the_data_set_has(tmp_path, parquet, change, error, message):
    with pytest.raises(error, match=message):
        load(tmp_path, parquet | change)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_hub_row_is_named_or_skipped(tmp_path, photos, streaming, caplog):
    broken = (photos / "2.png").read_bytes()[:300]
    rows = {
        "image": [{"bytes": b, "path": None} for b in ((photos / "1.png").read_bytes(), broken)],
        "caption": ["a", "b"],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    entry = {"source": "hub", "path": "t.parquet", "streaming": streaming}
    with pytest.raises(ValueError, match=r"t\.parquet: row 1: its picture does not open .*skip_bad_rows"):
        list(load(tmp_path, entry))
    with caplog.at_level(logging.WARNING):
        assert len(list(load(tmp_path, entry, skip_bad_rows=True))) == 1
    assert "row 1" in caplog.text


def test_a_changed_parquet_file_is_read_again(tmp_path, parquet):
    assert len(load(tmp_path, parquet)) == 3
    datasets.Dataset.from_parquet(str(tmp_path / "table.parquet")).take(1).to_parquet(tmp_path / "table.parquet")
    assert len(load(tmp_path, parquet)) == 1


def test_easy_vqa_splits_are_the_official_ones_and_a_fixed_tenth(tmp_path):
    def ids_of(split):
        entry = EasyVqa(folder=tmp_path, place="here", split=split)
        return {unit.fields["id"] for unit in entry.units(Rows(skip=False), grouped=True)}

    ids = {split: ids_of(split) for split in ("train", "fit", "held_out", "test")}
    sizes = {"train": 4000, "fit": 3600, "held_out": 400, "test": 1000}
    assert {split: len(found) for split, found in ids.items()} == sizes
    assert ids["fit"] | ids["held_out"] == ids["train"]
    assert not ids["fit"] & ids["held_out"]


def test_easy_vqa_asks_each_question_with_ten_equal_answers(tmp_path):
    records = load(tmp_path, {"source": "easy_vqa", "split": "test"})
    assert len(records) == 9673
    assert records[0]["answers"] == ["triangle"] * 10
    assert set(records["answer_type"]) == {"yes/no", "color", "shape"}
    what = load(tmp_path, {"source": "easy_vqa", "split": "test", "questions": "what"})
    assert all(texts(record)[0][1].startswith("<image>what") for record in what.select(range(50)))
    assert 0 < len(what) < len(records)


def test_a_missing_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "easy_vqa" else found(name, *rest)
    )
    with pytest.raises(ImportError, match=r"easy-vqa is missing; install it: pip install easy-vqa==1\.0"):
        load(tmp_path, {"source": "easy_vqa"})


def test_scenes_give_a_caption_questions_and_a_dialogue_a_picture(tmp_path):
    scene = next(scenes_moevlm.scenes("train", 1, seed=3))
    grouped = load(tmp_path, {"source": "scenes", "size": 1, "seed": 3}, grouped=True)
    assert [record["task"] for record in grouped] == ["caption", "vqa", "chat"]
    assert [text for role, text in texts(grouped[0]) if role == "assistant"] == list(scenes_moevlm.captions(scene))
    asked = scenes_moevlm.questions(scene)
    assert len(grouped[1]["messages"]) == 2 * len(asked)
    assert grouped[2]["refers_back"] == [turn.refers_back for turn in dialogue(scene)]
    single = load(tmp_path, {"source": "scenes", "size": 1, "seed": 3})
    assert [one["answer_type"] for one in single if one["task"] == "vqa"] == [one.answer_type for one in asked]
    assert single[0]["references"] == list(scenes_moevlm.captions(scene))
    assert single[0]["images"][0].tobytes() == scenes_moevlm.picture(scene).tobytes()


@pytest.mark.parametrize("task, questions", [("lookup", scenes_moevlm.lookups), ("place", scenes_moevlm.places)])
def test_lookups_and_places_of_a_scene_are_turns_of_one_record(task, questions, tmp_path):
    scene = next(scenes_moevlm.scenes("train", 1, seed=5))
    (record,) = load(tmp_path, {"source": "scenes", "size": 1, "seed": 5, "tasks": [task]}, grouped=True)
    said = [text.removeprefix("<image>") for _, text in texts(record)]
    assert record["task"] == "vqa"
    assert said == [text for one in questions(scene) for text in (one.question, one.answers[0])]


def test_scenes_take_the_split_of_their_part_and_only_the_tasks_wanted(tmp_path):
    for part in ("train", "eval", "test"):
        records = load(tmp_path, {"source": "scenes", "size": 2, "tasks": ["chat"]}, part=part)
        assert [record["id"] for record in records] == [f"scene-{part}-0-0", f"scene-{part}-0-1"]


def test_grouped_and_single_records_hold_the_same_questions_and_answers(tmp_path):
    def pairs(records):
        found = []
        for record in records:
            spoken = [text.removeprefix("<image>") for _, text in texts(record)]
            found += zip(spoken[::2], spoken[1::2])
        return found

    entry = {"source": "scenes", "size": 20, "tasks": ["vqa"]}
    assert pairs(load(tmp_path, entry, grouped=True)) == pairs(load(tmp_path, entry, grouped=False))


def test_size_draws_by_the_seed(tmp_path):
    def ids(**entry):
        return load(tmp_path, {"source": "easy_vqa", "split": "test", "size": 30, **entry})["id"][:]

    assert len(ids()) == 30
    assert ids() == ids(seed=0)
    assert set(ids(seed=1)) != set(ids())


def test_weight_repeats_records_in_training_only(tmp_path, captions):
    ids = load(tmp_path, captions | {"weight": 2.5})["id"][:]
    assert len(ids) == 5 and set(ids) == {"1", "2"}
    with pytest.raises(ValueError, match=r"eval\[0\]: weight=2.0 outside train"):
        load(tmp_path, captions | {"weight": 2.0}, part="eval")


def test_sources_stand_together_in_one_data_set(tmp_path, captions, vqa, parquet):
    lines(tmp_path, {"messages": said("q", "a")})
    records = load(tmp_path, captions, vqa, CHAT, parquet, {"source": "scenes", "size": 1})
    assert {record["task"] for record in records} == {"caption", "vqa", "chat"}
    columns = {"record": datasets.Value("string"), "stage": datasets.Value("int64")}
    columns["shift"] = datasets.List(datasets.Value("int64"))
    assert records.features == {**records_moevlm.FEATURES, **columns}


def test_a_stream_and_a_stored_source_are_drawn_by_their_weights(tmp_path, parquet):
    entries = (parquet | {"streaming": True, "weight": 1.0}, {"source": "scenes", "size": 30, "weight": 3.0})
    first, second = ([record["id"] for record in load(tmp_path, *entries)] for _ in range(2))
    assert first == second
    shares = sum(id.startswith("scene") for id in first) / len(first)
    assert 0.6 < shares < 0.9
    assert {f"table.parquet-train-{row}" for row in range(3)} <= set(first)


def test_a_stream_is_scored_once_a_record(tmp_path, parquet):
    entries = (parquet | {"streaming": True}, {"source": "scenes", "size": 5})
    ids = [(record["id"], record["task"]) for record in load(tmp_path, *entries, part="eval")]
    assert len(ids) == len(set(ids)) and len(ids) > 15


@pytest.mark.parametrize("part", ["train", "eval"])
@pytest.mark.parametrize("order", [1, -1])
def test_pictures_are_decoded_in_any_order_of_streams_and_stored_sources(tmp_path, parquet, part, order):
    entries = [parquet | {"streaming": True}, {"source": "scenes", "size": 5}][::order]
    found = list(load(tmp_path, *entries, part=part))
    assert {record["id"].partition("-")[0] for record in found} == {"scene", "table.parquet"}
    assert all(isinstance(image, Image.Image) for record in found for image in record["images"])


def test_records_are_built_once_and_again_when_a_file_or_an_option_changes(tmp_path, captions, builds):
    first = load(tmp_path, captions)
    again = load(tmp_path, captions)
    assert (len(builds), first._fingerprint) == (1, again._fingerprint)
    change(tmp_path / "captions.json", lambda c: c["annotations"][0].update(caption="changed"))
    os.utime(tmp_path / "captions.json", ns=(1, 1))
    assert load(tmp_path, captions)[0]["references"][0] == "changed"
    assert texts(load(tmp_path, captions | {"prompt": "Say."})[0])[0] == ("user", "<image>Say.")
    load(tmp_path, captions, grouped=True)
    assert len(builds) == 4


@pytest.mark.parametrize("name", ["max_samples", "test_max_samples", "max_length"])
def test_no_record_is_no_bound(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1; null"):
        DataArguments(**{name: 0})


def test_parts_are_listed_and_test_falls_back_to_eval(tmp_path):
    path = mixture(tmp_path, {"source": "scenes", "size": 1}, eval=[{"source": "scenes", "size": 2}])
    assert mixture_parts(path) == ["eval", "train"]
    assert set(load_mixture(path, "test", grouped=True)["id"]) == {"scene-eval-0-0", "scene-eval-0-1"}
    with pytest.raises(ValueError, match="unknown 'valid'.*; known: train, eval, test"):
        load_mixture(path, "valid", grouped=True)
    path.write_text("train: [{source: scenes, size: 1}]")
    with pytest.raises(ValueError, match="has no part 'eval', only train; add `eval:`"):
        load_mixture(path, "test", grouped=True)


@pytest.mark.parametrize("name", ["default", "easy_vqa", "scenes"])
def test_shipped_mixtures_are_valid_in_every_part(name, monkeypatch):
    made = []
    monkeypatch.setattr(records_moevlm, "store", lambda *args, **kwargs: made.append(args) or _nothing())
    for part in ("train", "eval", "test"):
        load_mixture(CONFIGS / f"{name}.yaml", part, grouped=True)
    assert len(made) >= 3


def _nothing():
    return datasets.Dataset.from_dict({"id": []})


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "train: [{source: scenes, sise: 3}]",
            r"train\[0\]: unknown 'sise' \(did you mean 'size'\?\); known: size, seed",
        ),
        ("train: [{source: scene}]", r"train\[0\]: source: unknown 'scene' \(did you mean 'scenes'\?\)"),
        ("train: [{size: 3}]", r"train\[0\]: .* names no source; write \{source"),
        ("train: [scenes]", r"train\[0\]: 'scenes' names no source"),
        ("trian: [{source: scenes}]", r"unknown 'trian' \(did you mean 'train'\?\); known: train, eval, test"),
        ("train: {source: scenes}", r"train is .*; make it a list"),
        ("train: []", r"train is \[\]; make it a list"),
        ("train: [{source: scenes, split: valid}]", r"split: unknown 'valid'.*; known: train, eval, test"),
        ("train: [{source: scenes, tasks: [caption, qa]}]", r"tasks: unknown 'qa'.*known: caption, vqa, chat"),
        ("train: [{source: scenes, size: many}]", r"size is 'many'; it must be int"),
        ("train: [{source: scenes, size: true}]", r"size is True; it must be int"),
        ("train: [{source: scenes, size: 0}]", r"size is 0; it must be above 0"),
        ("train: [{source: scenes, weight: -1}]", r"weight is -1; it must be above 0"),
        ("train: [{source: scenes, weight: .nan}]", r"weight is nan; it must be above 0"),
        ("train: [{source: chat, path: .}]", r"source chat needs images; add it"),
        ("train: [{source: scenes}]\ntrain: [{source: easy_vqa}]", r"not valid YAML: .*'train'\] stands twice"),
        ("train: [{source: scenes", r"is not valid YAML"),
        ("", r"holds no parts; write `train:`"),
    ],
)
def test_a_mistake_in_the_mixture_is_named_with_the_way_out(tmp_path, text, message):
    path = write(tmp_path / "mixture.yaml", text)
    with pytest.raises(ValueError, match=message):
        load_mixture(path, "train", grouped=True)


def test_missing_files_are_named_with_their_entry(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml does not exist"):
        load_mixture(tmp_path / "nothing.yaml", "train", grouped=True)
    with pytest.raises(
        FileNotFoundError, match=r"train\[0\]: annotations: .*c\.json does not exist; paths are relative"
    ):
        load(tmp_path, {"source": "coco_captions", "annotations": "c.json", "images": "."})


def test_a_file_that_is_not_json_is_named(tmp_path, captions):
    write(tmp_path / "captions.json", "{")
    with pytest.raises(ValueError, match=r"captions\.json: is not valid JSON"):
        load(tmp_path, captions)


def test_training_records_carry_the_stage_of_their_entry(tmp_path):
    easy = {"source": "scenes", "size": 1, "max_shapes": 1, "tasks": ["caption"], "stage": 0}
    hard = {"source": "scenes", "size": 2, "tasks": ["caption"]}
    assert load(tmp_path, hard, easy)["stage"][:] == [1, 1, 0]
    assert "stage" not in load(tmp_path, hard, part="eval").column_names


def test_each_copy_of_a_picture_has_a_shift_of_its_own_within_the_bound(tmp_path):
    spec = {"source": "scenes", "size": 5, "tasks": ["caption"], "weight": 20, "shift": 3}
    shifts = load(tmp_path, spec)["shift"][:]
    assert {offset for shift in shifts for offset in shift} == set(range(-3, 4))
    assert shifts[::5] != [shifts[0]] * 20
    assert shifts == load(tmp_path, spec)["shift"][:]


@pytest.mark.parametrize("shift, message", [(-1, "shift=-1 is negative"), (1.5, "shift is 1.5; it must be int")])
def test_a_shift_out_of_bounds_is_an_error(tmp_path, shift, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, {"source": "scenes", "size": 1, "shift": shift})
