# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Records to sequences and batches: what is learned, what is packed, what is padded."""

import copy
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image

from moevlm.collating_moevlm import IGNORED, MoeVlmCollator, encode_or_skip, encode_record, shifted, without_skipped
from moevlm.processing_moevlm import build_processor, train_tokenizer
from moevlm.records_moevlm import messages_of

LENGTH = 3
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=8), image_seq_length=LENGTH)
RED, BLUE = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (5, 5), "blue")
QUESTIONS = [
    ("What is the colour?", "red"),
    ("Is it round?", "no"),
    ("How many are there?", "12 of them"),
    ("Why?", ""),
]


@pytest.fixture(scope="module")
def processor():
    texts = [text for pair in QUESTIONS for text in pair] * 10
    return build_processor(CONFIG, train_tokenizer(texts, 300))


@pytest.fixture(scope="module")
def unmarked(processor):
    """The same processor with a template that does not mark the assistant's tokens."""
    plain = copy.copy(processor)
    plain.chat_template = re.sub(r"\{%-? *(end)?generation *-?%\}", "", processor.chat_template)
    return plain


def record(pairs=QUESTIONS[:1], *, task="vqa", images=1, system=None, images_in_turn=0):
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, (question, answer) in enumerate(pairs):
        # As Arrow gives it back: every key in every part.
        pictures = [{"type": "image", "text": None}] * (images if number == images_in_turn else 0)
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": "r1", "task": task, "messages": messages}


def answers_of(row, processor):
    """The learned tokens as text, one string for each run of them."""
    texts, run = [], []
    for token, label in zip([*row["input_ids"], None], [*row["labels"], IGNORED]):
        if label == IGNORED and run:
            texts.append(processor.decode(run))
            run = []
        elif label != IGNORED:
            assert label == token
            run.append(label)
    return texts


# Labels


def test_only_the_answer_and_its_end_are_learned(processor):
    row = encode_record(record(), processor)
    assert answers_of(row, processor) == ["red<|end|>"]
    assert processor.decode(row["input_ids"]) == (
        "<|user|>" + "<image>" * LENGTH + "What is the colour?<|assistant|>red<|end|>"
    )


def test_every_answer_of_a_chat_is_learned(processor):
    row = encode_record(record(QUESTIONS, task="chat", system="be short"), processor)
    assert answers_of(row, processor) == ["red<|end|>", "no<|end|>", "12 of them<|end|>", "<|end|>"]
    assert row["position_ids"] == list(range(len(row["input_ids"])))
    assert set(row["segment_ids"]) == {0}


@pytest.mark.parametrize("task, images", [("vqa", 1), ("vqa", 0), ("vqa", 2), ("chat", 1), ("caption", 1)])
def test_training_sees_the_tokens_that_generation_sees(processor, task, images):
    one = record(QUESTIONS if task == "chat" else QUESTIONS[:1], task=task, images=images)
    messages = copy.deepcopy(one["messages"])
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["image"] = RED
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    row = encode_record(one, processor)
    assert row["input_ids"] == batch["input_ids"][0]
    assert [int(label != IGNORED) for label in row["labels"]] == list(batch["assistant_masks"][0])


@pytest.mark.parametrize("task", ["vqa", "chat"])
def test_a_template_without_marks_gives_the_same_labels(processor, unmarked, task):
    assert encode_record(record(QUESTIONS, task=task), unmarked) == encode_record(
        record(QUESTIONS, task=task), processor
    )


def test_what_a_template_writes_past_the_end_token_is_not_learned(unmarked):
    wordy = copy.copy(unmarked)
    wordy.chat_template = unmarked.chat_template.replace("'<|end|>'", "'<|end|>\\n'")
    row = encode_record(record(QUESTIONS[:2], task="chat"), wordy)
    assert answers_of(row, wordy) == ["red<|end|>", "no<|end|>"]
    assert wordy.decode(row["input_ids"]).count("<|end|>\n") == 2


def test_a_token_that_reaches_into_the_answer_is_learned(processor):
    spaced = copy.copy(processor)
    spaced.chat_template = processor.chat_template.replace("{%- generation -%}", "{{- ' ' -}}{%- generation -%}")
    row = encode_record(record([("How many of them?", "of them")]), spaced)
    assert spaced.tokenizer.tokenize(" of")[0].startswith("\u0120o")  # the template's space and the answer in one token
    assert answers_of(row, spaced) == [" of them<|end|>"]


def test_a_template_that_rewrites_earlier_turns_is_an_error(unmarked):
    forgetful = copy.copy(unmarked)
    forgetful.chat_template = "{%- set messages = messages[-2:] -%}" + unmarked.chat_template
    with pytest.raises(ValueError, match="record 'r1': the chat template renders message 1 differently"):
        encode_record(record(QUESTIONS, task="chat"), forgetful)


# Packing


@pytest.mark.parametrize("task", ["vqa", "caption"])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("system", [None, "be short"])
def test_each_packed_turn_is_token_for_token_the_turn_alone(processor, task, images, system):
    packed = encode_record(record(QUESTIONS, task=task, images=images, system=system), processor)
    columns = list(zip(packed["input_ids"], packed["labels"], packed["position_ids"], packed["segment_ids"]))
    assert max(packed["segment_ids"]) == len(QUESTIONS)
    for number, pair in enumerate(QUESTIONS, start=1):
        seen = [(token, label, position) for token, label, position, segment in columns if segment in (0, number)]
        alone = encode_record(record([pair], task=task, images=images, system=system), processor)
        assert seen == list(zip(alone["input_ids"], alone["labels"], alone["position_ids"]))


def test_the_picture_stands_once_and_ends_the_shared_segment(processor):
    packed = encode_record(record(QUESTIONS, images=2), processor)
    shared = packed["segment_ids"].count(0)
    assert packed["segment_ids"] == sorted(packed["segment_ids"])
    assert packed["input_ids"].count(processor.image_token_id) == 2 * LENGTH
    assert packed["input_ids"][shared - 1] == processor.image_token_id


def test_no_answer_follows_another_segment_directly(processor):
    packed = encode_record(record(QUESTIONS), processor)
    for before, after, label in zip(packed["segment_ids"], packed["segment_ids"][1:], packed["labels"][1:]):
        assert before == after or label == IGNORED


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["messages"][0]["content"].reverse(), "text stands before a picture"),
        (
            lambda r: r["messages"][2]["content"].insert(0, {"type": "image"}),
            "a later turn of a vqa record has a picture",
        ),
    ],
)
def test_turns_that_cannot_share_the_picture_are_an_error(processor, change, message):
    bad = record(QUESTIONS)
    change(bad)
    with pytest.raises(ValueError, match=f"^record 'r1': {message}"):
        encode_record(bad, processor)


def test_the_record_is_left_as_it_was(processor):
    one = record(QUESTIONS)
    before = copy.deepcopy(one)
    encode_record(one, processor)
    assert one == before


# Lengths


@pytest.mark.parametrize("task", ["vqa", "chat"])
def test_whole_turns_are_dropped_from_the_end(processor, task):
    full = encode_record(record(QUESTIONS, task=task), processor)
    three = encode_record(record(QUESTIONS[:3], task=task), processor)
    two = encode_record(record(QUESTIONS[:2], task=task), processor)
    length = len(three["input_ids"])
    assert encode_record(record(QUESTIONS, task=task), processor, len(full["input_ids"])) == full
    assert encode_record(record(QUESTIONS, task=task), processor, length) == three
    assert encode_record(record(QUESTIONS, task=task), processor, length - 1) == two


@pytest.mark.parametrize("task", ["vqa", "chat"])
@pytest.mark.parametrize("pairs", [QUESTIONS[:1], QUESTIONS])
def test_a_first_turn_that_does_not_fit_is_an_error(processor, task, pairs):
    needed = len(encode_record(record(pairs[:1], task=task), processor)["input_ids"])
    with pytest.raises(ValueError, match=f"record 'r1': the first turn alone takes {needed} tokens but max_length="):
        encode_record(record(pairs, task=task), processor, max_length=needed - 1)


def test_a_dropped_turn_takes_its_pictures_along(processor):
    two_pictures = record(QUESTIONS[:2], task="chat")
    two_pictures["messages"][2]["content"].insert(0, {"type": "image"})
    full = encode_record(two_pictures, processor)
    cut = encode_record(two_pictures, processor, len(full["input_ids"]) - 1)
    assert cut["input_ids"].count(processor.image_token_id) == LENGTH
    batch = MoeVlmCollator(processor)([{**cut, "images": [RED, BLUE]}])
    assert torch.equal(batch["pixel_values"], processor(images=RED, return_tensors="pt")["pixel_values"])


# Bad records


def test_a_record_without_an_answer_is_an_error(processor):
    bad = record()
    bad["messages"].pop()
    with pytest.raises(ValueError, match="record 'r1': there is no assistant message"):
        encode_record(bad, processor)


@pytest.mark.parametrize("control", ["<|end|>", "<|assistant|>", "<|user|>"])
def test_a_control_token_written_into_a_text_is_an_error_or_left_out_by_name(processor, caplog, control):
    record = {"id": "r1", "task": "vqa", "messages": messages_of([(f"is {control} seen?", "no")])}
    with pytest.raises(ValueError, match=f"record 'r1': a text holds {re.escape(control)}, .* take it out"):
        encode_record(record, processor)
    empty = {name: [] for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    with caplog.at_level("WARNING"):
        assert encode_or_skip(record, processor) == empty
    assert "left out record 'r1'" in caplog.text
    good = {"id": "r2", "task": "vqa", "messages": messages_of([("seen?", "no")])}
    assert encode_or_skip(good, processor) == encode_record(good, processor)


def test_records_that_were_skipped_are_counted_even_if_datasets_remembers_them(processor, caplog):
    records = [{"id": id, "task": "vqa", "messages": messages_of([(id, "no")])} for id in ("a", "<|end|>", "c")]
    for _ in range(2):  # the second time `datasets` answers from its cache, and logs no record
        caplog.clear()
        encoded = Dataset.from_list(records).map(encode_or_skip, fn_kwargs={"processor": processor})
        assert without_skipped(encoded)["id"] == ["a", "c"]
        assert "left out 1 of 3 records that cannot be encoded" in caplog.text
    with pytest.raises(ValueError, match="none of 1 records can be encoded; run without skip_bad_rows"):
        without_skipped(encoded.select([1]))
    assert len(list(without_skipped(encoded.to_iterable_dataset()))) == 2


def test_the_image_token_written_into_a_text_is_an_error(processor):
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        encode_record(record([("What is <image>?", "no")]), processor)


# Batches


def rows_of(processor):
    return [
        {**encode_record(record(QUESTIONS), processor), "images": [RED]},
        {**encode_record(record(images=0), processor), "images": []},
        {**encode_record(record(images=2), processor), "images": [BLUE, RED]},
    ]


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_a_batch_is_its_rows_padded_on_the_right_to_the_multiple(processor, multiple):
    rows = rows_of(processor)
    batch = MoeVlmCollator(processor, pad_to_multiple_of=multiple)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    length = batch["input_ids"].shape[1]
    assert length % multiple == 0 and longest <= length < longest + multiple
    fillers = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "segment_ids": 0}
    for number, row in enumerate(rows):
        real = len(row["input_ids"])
        assert batch["attention_mask"][number].tolist() == [1] * real + [0] * (length - real)
        for name, filler in fillers.items():
            assert batch[name][number].tolist() == row[name] + [filler] * (length - real)


def test_the_batch_holds_its_pictures_in_order(processor):
    batch = MoeVlmCollator(processor)(rows_of(processor))
    assert torch.equal(batch["pixel_values"], processor(images=[RED, BLUE, RED], return_tensors="pt")["pixel_values"])
    assert (batch["input_ids"] == processor.image_token_id).sum() == LENGTH * len(batch["pixel_values"])


def test_a_batch_without_pictures_has_no_pixel_values(processor):
    batch = MoeVlmCollator(processor)([{**encode_record(record(images=0), processor), "images": None}])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "position_ids", "segment_ids"]


def test_fewer_pictures_than_the_text_has_are_an_error(processor):
    row = {**encode_record(record(images=2), processor), "images": [RED]}
    with pytest.raises(ValueError, match="a row has 1 images but its text has 2"):
        MoeVlmCollator(processor)([row])


def test_a_collator_needs_a_padding_token_and_a_positive_multiple(processor):
    with pytest.raises(ValueError, match="pad_to_multiple_of=0 is below 1"):
        MoeVlmCollator(processor, pad_to_multiple_of=0)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad_token"):
        MoeVlmCollator(SimpleNamespace(tokenizer=tokenizer))


def test_records_may_come_from_datasets_and_their_pictures_stay_closed(processor, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{**record(QUESTIONS[:2]), "images": [str(tmp_path / "broken.png")]}]
    data = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    encoded = data.map(encode_record, fn_kwargs={"processor": processor}, new_fingerprint="test")
    assert encoded.remove_columns("images")[0]["input_ids"] == encode_record(rows[0], processor)["input_ids"]


def test_a_shifted_picture_is_moved_and_its_edge_repeated():
    picture = Image.new("RGB", (4, 3), "white")
    picture.putpixel((0, 1), (255, 0, 0))
    moved = shifted(picture, 2, -1)
    red = [(x, y) for x, y in product(range(4), range(3)) if moved.getpixel((x, y)) == (255, 0, 0)]
    assert red == [(0, 0), (1, 0), (2, 0)]


def test_the_collator_moves_the_pictures_of_rows_with_a_shift(processor):
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    row = encode_record(record(), processor)
    collate = MoeVlmCollator(processor)
    plain = collate([{**row, "images": [picture], "shift": [0, 0]}])["pixel_values"]
    moved = collate([{**row, "images": [picture], "shift": [3, 0]}])["pixel_values"]
    wanted = collate([{**row, "images": [shifted(picture, 3, 0)]}])["pixel_values"]
    assert torch.equal(moved, wanted) and not torch.equal(moved, plain)
