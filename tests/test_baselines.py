# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The floor of those who never look, questions without pictures, and which models can be scored."""

import pytest
from asked_records import chat, vqa

from moevlm.baselines_moevlm import commonest_answers, load_model, without_pictures
from moevlm.evaluation_moevlm import samples_from


def test_the_floor_answers_by_words_then_type_then_task():
    train = [
        vqa("1", "What is it?", "dog", question_type="what"),
        vqa("2", "What is it?", "cat", question_type="what"),
        vqa("3", "What is it?", "cat", question_type="what"),
        vqa("4", "How many?", "2", question_type="how"),
        vqa("5", "Is it?", "yes", question_type="is"),
        vqa("6", "Is it?", "yes", question_type="is"),
        vqa("7", "Is it?", "yes", question_type="is"),
    ]
    test = [
        vqa("known words", "What is it?", "cat", question_type="what"),
        vqa("known type", "How many dogs?", "2", question_type="how"),
        vqa("known task", "Why?", "yes", question_type="why"),
    ]
    asked = samples_from([*test, chat("unknown task", "What?", "a dog")])
    assert commonest_answers(samples_from(train), asked) == ["cat", "2", "yes", ""]


def test_a_question_without_its_picture_keeps_its_words():
    _, sample = samples_from([chat("d", "What?", "a dog", "Where?", "left")])
    blind = without_pictures(sample)
    assert sample.num_images == 1 and blind.num_images == 0 and blind.images == []
    texts = [[part["text"] for part in message["content"]] for message in blind.prompt]
    assert texts == [["What?"], ["a dog"], ["Where?"]]
    assert blind.target == sample.target


def test_a_run_needs_a_model_or_answers():
    with pytest.raises(ValueError, match="name a checkpoint, or a file of answers with --predictions"):
        load_model(None, "auto", "cpu")
