# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Samples, batched answers, scores and their intervals, the floor."""

from pathlib import Path

import evaluate
import numpy as np
import peft
import pytest
import torch
import torch.multiprocessing
from asked_records import COLOURS, caption, chat, message, vqa
from conftest import tiny_config
from datasets import Dataset
from PIL import Image
from transformers import GenerationConfig

from moevlm.answers_moevlm import warnings_of
from moevlm.evaluation_moevlm import (
    Rules,
    bootstrap_interval,
    predict,
    reference_agreement,
    samples_from,
    score,
    score_each,
    token_f1,
)
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.processing_moevlm import build_processor, train_tokenizer

METRICS = Path(__file__).resolve().parent.parent / "metrics"
WORDS = ["What colour is it?", "Describe the picture.", "red green blue grey", "a long question about a small thing"]


def make_processor(config):
    processor = build_processor(config, train_tokenizer(WORDS, 300))
    config.image_token_id = processor.image_token_id
    return processor


@pytest.fixture
def processor(config):
    return make_processor(config)


@pytest.fixture(scope="module")
def metrics():
    return {name: evaluate.load(str(METRICS / name)) for name in ("cider", "caption_overlap", "vqa_accuracy")}


class Parrot(torch.nn.Module):
    """Says the last word of each question, and keeps what it was given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tokenizer):
        super().__init__()
        self.frozen = torch.nn.Dropout().eval()
        self.tokenizer = tokenizer
        self.generation_config = GenerationConfig()
        self.config = tiny_config()
        self.calls = []

    def generate(self, input_ids, attention_mask, pixel_values=None, **settings):
        self.calls.append({"mask": attention_mask, "pictures": pixel_values, "training": self.training, **settings})
        texts = self.tokenizer.batch_decode(input_ids)
        words = [text.removesuffix("<|assistant|>").split()[-1] for text in texts]
        answers = self.tokenizer([f" {word} <|end|>" for word in words], padding=True, padding_side="right")
        return torch.cat([input_ids, torch.tensor(answers["input_ids"])], dim=1)


class Looker(Parrot):
    """Names the strongest colour of the picture of each row."""

    def generate(self, input_ids, pixel_values, **settings):
        share = (pixel_values + 1).mean((2, 3))
        pure = share.max(1).values > 0.95 * share.sum(1)
        names = [list(COLOURS)[at] if sure else "grey" for at, sure in zip(share.argmax(1), pure, strict=True)]
        answers = self.tokenizer(names, padding=True, padding_side="right")
        return torch.cat([input_ids, torch.tensor(answers["input_ids"])], dim=1)


def test_a_dialogue_is_asked_turn_by_turn_with_the_true_history():
    first, second = samples_from([chat("d", "What?", "a dog", "How many?", "2", refers_back=[False, True])])
    assert (first.id, first.target, first.refers_back, len(first.prompt)) == ("d#0", "a dog", False, 1)
    assert (second.id, second.target, second.refers_back) == ("d#1", "2", True)
    assert [turn["content"][-1]["text"] for turn in second.prompt] == ["What?", "a dog", "How many?"]
    assert second.question == "How many?"


def test_a_turn_sees_the_pictures_shown_so_far_only():
    record = chat("d", "What?", "red", "And this?", "green")
    record["messages"][2] = message("user", "And this?", images=1)
    record["images"] = [Image.new("RGB", (4, 4), COLOURS["red"]), Image.new("RGB", (4, 4), COLOURS["green"])]
    first, second = samples_from([record])
    assert [image.getpixel((0, 0)) for image in first.images] == [COLOURS["red"]]
    assert [image.getpixel((0, 0)) for image in second.images] == [COLOURS["red"], COLOURS["green"]]


def test_an_answer_of_several_parts_is_scored_whole():
    record = chat("d", "Where?", "a red")
    record["messages"][1]["content"].append({"type": "text", "text": " wall"})
    assert [sample.target for sample in samples_from([record])] == ["a red wall"]


def test_a_stored_data_set_gives_the_samples_of_its_rows():
    records = [vqa(f"q{at}", "What colour is it?", colour, colour) for at, colour in enumerate(COLOURS)]
    stored = samples_from(Dataset.from_list(records))
    assert [one._replace(read_images=None, version="") for one in stored] == [
        one._replace(read_images=None) for one in samples_from(records)
    ]
    assert [one.images[0].getpixel((0, 0)) for one in stored] == list(COLOURS.values())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task": "ocr"}, "task='ocr'; use one of caption, vqa, chat"),
        ({"messages": [message("user", "What?", 1)]}, "holds 0 assistant turns"),
        ({"messages": [message("assistant", "red"), message("assistant", "blue")]}, "grouped=False"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(change, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        samples_from([vqa("row 7", "What?", "red") | change])
    assert "row 7" in str(error.value)


def test_answers_come_back_in_the_order_of_the_samples(processor):
    words = ["one", "three", "seven", "two", "nine"]
    questions = [f"{'so ' * (7 * at % 5)}{word}" for at, word in enumerate(words)]
    samples = samples_from([vqa(str(at), question, "red") for at, question in enumerate(questions)])
    model = Parrot(processor.tokenizer)
    assert predict(model, processor, samples, batch_size=2) == words
    lengths = [call["mask"].sum(1).tolist() for call in model.calls]
    assert sum(lengths, []) == sorted(sum(lengths, []), reverse=True), "the longest first"
    assert all(call["mask"][:, -1].all() for call in model.calls), "padded on the left"
    assert [len(call["pictures"]) for call in model.calls] == [2, 2, 1]


def test_a_batch_holds_one_task_with_its_own_limit(processor):
    records = [vqa("q", "what", "red"), caption("c", ["a"]), vqa("r", "what", "red"), chat("d", "what", "b")]
    model = Parrot(processor.tokenizer)
    predict(model, processor, samples_from(records), batch_size=8, max_new_tokens={"vqa": 3, "caption": 5})
    limits = {call["max_new_tokens"]: len(call["mask"]) for call in model.calls}
    assert limits == {3: 2, 5: 1, 64: 1}


def test_whole_batches_of_known_answers_are_not_asked_again(processor):
    words = ["one", "three", "seven", "two", "nine"]
    samples = samples_from([vqa(str(at), "so " * at + word, "red") for at, word in enumerate(words)])
    kept = {}
    predict(
        Parrot(processor.tokenizer), processor, samples, batch_size=2, keep=lambda at, said: kept.update(zip(at, said))
    )
    assert kept == dict(enumerate(words))
    # The longest first: the batches are (4, 3), (2, 1) and (0); only half of the second is known.
    known, again = {4: "NINE", 3: "TWO", 2: "SEVEN"}, []
    model = Parrot(processor.tokenizer)
    said = predict(model, processor, samples, batch_size=2, known=known, keep=lambda places, _: again.append(places))
    assert said == ["one", "three", "seven", "TWO", "NINE"]
    assert again == [[2, 1], [0]] and len(model.calls) == 2


def test_a_task_without_a_limit_of_its_own_takes_the_one_for_all(processor):
    samples = [sample._replace(task="ocr") for sample in samples_from([vqa("q", "what", "red")])]
    model = Parrot(processor.tokenizer)
    predict(model, processor, samples, batch_size=1, max_new_tokens=7)
    assert model.calls[0]["max_new_tokens"] == 7


def test_a_prompt_beyond_the_models_positions_is_told(processor):
    samples = samples_from([vqa("q", "what", "red")])
    model = Parrot(processor.tokenizer)
    with warnings_of("moevlm") as heard:
        predict(model, processor, samples, batch_size=1, max_new_tokens=4)
        assert not heard
        model.config.text_config.max_position_embeddings = 12
        predict(model, processor, samples, batch_size=1, max_new_tokens=4)
    assert len(heard) == 1 and "its answer of 4 tokens pass the model's 12 positions" in heard[0]


@pytest.mark.parametrize(
    "brought",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_return_sequences": 2},
        {"min_new_tokens": 12},
        {"min_length": 60},
        {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 5},
    ],
    ids=lambda brought: next(iter(brought)),
)
def test_what_a_checkpoint_brings_for_generation_does_not_change_its_scores(brought):
    config = tiny_config(vocab_size=300)
    processor = make_processor(config)
    torch.manual_seed(0)
    model = MoeVlmForConditionalGeneration(config).eval()
    samples = samples_from([vqa("q", "What colour is it?", "red"), vqa("p", "a long question", "no")])
    ask = {"batch_size": 2, "max_new_tokens": 8}
    prompt = processor.apply_chat_template(samples[0].prompt, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompt, images=samples[0].images, return_tensors="pt")
    said = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = said  # so that a least length shows
    plain = predict(model, processor, samples, **ask)
    for name, value in brought.items():
        setattr(model.generation_config, name, value)
    assert predict(model, processor, samples, **ask) == plain
    kept = model.generation_config
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))  # new: it adds nothing yet
    assert predict(adapted, processor, samples, **ask) == plain
    assert model.generation_config is kept


def test_questions_without_pictures_are_answered_too(processor):
    record = vqa("q", "what", "red") | {"messages": [message("user", "say yes"), message("assistant", "yes")]}
    record["images"] = None
    samples = samples_from([record, vqa("p", "say no", "no")])
    assert predict(Parrot(processor.tokenizer), processor, samples, batch_size=2) == ["yes", "no"]


def test_no_samples_give_no_answers(processor):
    assert predict(Parrot(processor.tokenizer), processor, [], batch_size=2) == []


def test_training_goes_on_where_answering_interrupted_it(processor):
    model = Parrot(processor.tokenizer).train()
    model.frozen.eval()
    processor.tokenizer.padding_side = "right"
    predict(model, processor, samples_from([vqa("q", "what", "red")]), batch_size=1)
    assert not model.calls[0]["training"]
    assert model.training and not model.frozen.training
    assert processor.tokenizer.padding_side == "right"


def test_a_blind_model_sees_seeded_noise_of_the_same_size(processor):
    names = list(COLOURS) * 4
    samples = samples_from([vqa(str(at), "What colour?", name, name) for at, name in enumerate(names)])
    model = Looker(processor.tokenizer)
    assert predict(model, processor, samples, batch_size=4) == names
    assert predict(model, processor, samples, batch_size=4, blind=True) == ["grey"] * 12
    model = Parrot(processor.tokenizer)
    for seed in (0, 0, 1):
        predict(model, processor, samples[:1], batch_size=1, blind=True, seed=seed)
    once, again, other = (call["pictures"] for call in model.calls)
    assert torch.equal(once, again) and not torch.equal(once, other)


def real_model_and_samples():
    torch.manual_seed(0)
    config = tiny_config(vocab_size=300)
    processor = make_processor(config)
    model = MoeVlmForConditionalGeneration(config).eval()
    lengths = (1, 9, 4, 2, 12, 3, 7)
    records = [vqa(str(at), "thing " * length, "red", list(COLOURS)[at % 3]) for at, length in enumerate(lengths)]
    return model, processor, samples_from(records)


def test_a_batch_of_different_lengths_answers_like_single_questions():
    model, processor, samples = real_model_and_samples()
    together = predict(model, processor, samples, batch_size=4, max_new_tokens=6)
    alone = [predict(model, processor, [sample], batch_size=1, max_new_tokens=6)[0] for sample in samples]
    assert together == alone
    assert len(set(together)) > 1


def test_a_model_can_train_on_after_answering():
    model, processor, samples = real_model_and_samples()
    predict(model, processor, samples, batch_size=4, max_new_tokens=2)
    inputs = processor(text="<image>red", images=Image.new("RGB", (8, 8)), return_tensors="pt")
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def answer_on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, processor, samples = real_model_and_samples()
    answered, generate = [], model.generate
    model.generate = lambda **inputs: answered.append(len(inputs["input_ids"])) or generate(**inputs)
    predictions = predict(model, processor, samples, batch_size=2, max_new_tokens=6)
    torch.save({"answered": sum(answered), "predictions": predictions}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_answer_each_sample_once_and_like_one(tmp_path):
    model, processor, samples = real_model_and_samples()
    torch.multiprocessing.spawn(answer_on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["answered"] + second["answered"] == len(samples)
    assert first["predictions"] == second["predictions"]
    assert first["predictions"] == predict(model, processor, samples, batch_size=2, max_new_tokens=6)


def test_vqa_scores_by_hand(metrics):
    records = [
        vqa("a", "What?", "red", question_type="what", answer_type="colour"),
        vqa("b", "What?", "blue", question_type="what", answer_type="colour"),
        vqa("c", "How many?", "2", question_type="how", answer_type="count"),
        vqa("d", "How many?", "4", question_type="how", answer_type="count"),
    ]
    records[3]["answers"] = ["4"] * 8 + ["5", "five"]
    scores = score(samples_from(records), ["Red ", "green", "2", "5"], metrics)["vqa"]
    # "Red " against ten times "red": the official comparison is raw where all agree. "5": two of ten said so, which
    # is 8/10 * 2/3 + 2/10 * 1/3 of an agreement.
    assert scores["vqa_accuracy"] == pytest.approx((0 + 0 + 100 + 60) / 4)
    assert scores["exact_match"] == 50.0
    assert scores["per_answer_type"] == {"colour": 0.0, "count": 80.0}
    assert scores["per_question_type"] == {"what": 0.0, "how": 80.0}
    assert scores["n"] == 4
    low, high = scores["interval_95"]["vqa_accuracy"]
    assert low <= scores["vqa_accuracy"] <= high


def test_one_persons_answer_counts_fully(metrics):
    records = [vqa("a", "What?", "red") | {"answers": ["red"]}, vqa("b", "What?", "red") | {"answers": None}]
    assert score(samples_from(records), ["red", "red"], metrics)["vqa"]["vqa_accuracy"] == 100.0


def test_dialogue_scores_by_hand(metrics):
    records = [
        chat("a", "What?", "a red dog", "How many?", "2", refers_back=[False, True]),
        chat("b", "What?", "a cat", "Where?", "on the left", refers_back=[False, True]),
    ]
    scores = score(samples_from(records), ["A red dog", "3", "a cat", "left"], metrics)["chat"]
    assert scores["turn_accuracy"] == 50.0
    assert scores["refers_back_accuracy"] == 0.0
    # "left" against "on the left": precision 1, recall 1/3.
    assert scores["token_f1"] == pytest.approx((100 + 0 + 100 + 50) / 4)
    assert scores["n"] == 4
    assert scores["n_by_score"] == {"turn_accuracy": 4, "refers_back_accuracy": 2, "token_f1": 4}


def test_dialogues_that_never_refer_back_have_no_such_score(metrics):
    scores = score(samples_from([chat("a", "What?", "a dog")]), ["a dog"], metrics)["chat"]
    assert "refers_back_accuracy" not in scores and scores["turn_accuracy"] == 100.0


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [("a b", "b c", 0.5), ("A, b!", "a b", 1.0), ("", "", 1.0), ("", "a", 0.0), ("x", "y", 0.0), ("a a", "a", 2 / 3)],
)
def test_token_f1_by_hand(prediction, target, expected):
    assert token_f1(prediction, target) == pytest.approx(expected)


def test_each_sample_has_its_own_scores_in_its_place(metrics):
    records = [vqa("a", "What?", "red"), chat("d", "What?", "a dog", "Where?", "left", refers_back=[False, True])]
    records.append(vqa("b", "What?", "blue"))
    samples = samples_from(records)
    assert [sample.turn for sample in samples] == [None, 1, 2, None]
    scores, rows = score_each(samples, ["red", "a dog", "a left", "red"], metrics, seed=0, rules=Rules())
    assert rows[0] == {"vqa_accuracy": 100.0, "exact_match": 100.0} and rows[3]["vqa_accuracy"] == 0.0
    assert "refers_back_accuracy" not in rows[1] and rows[2]["refers_back_accuracy"] == 0.0
    assert rows[2]["token_f1"] == pytest.approx(200 / 3)
    assert scores == score(samples, ["red", "a dog", "a left", "red"], metrics)


def test_a_task_of_its_own_name_is_scored_by_its_metric(metrics):
    samples = [sample._replace(task="ocr", metric="turn_accuracy") for sample in samples_from([vqa("a", "?", "b")])]
    assert score(samples, ["B"], metrics)["ocr"]["turn_accuracy"] == 100.0


def test_answers_are_normalised_everywhere_only_on_request(metrics):
    samples = samples_from([vqa("a", "What?", "red")])
    for rule, percent in (("official", 0.0), ("always", 100.0)):
        scores, _ = score_each(samples, ["the Red."], metrics, seed=0, rules=Rules(normalize=rule))
        assert scores["vqa"]["vqa_accuracy"] == percent and scores["vqa"]["normalize"] == rule


def test_a_table_of_frequencies_makes_a_subset_score_as_it_does_in_the_whole(metrics):
    references = different_captions(60)
    table = metrics["cider"].document_frequencies(references)
    samples = samples_from([caption(str(at), texts) for at, texts in enumerate(references)])
    guesses = [texts[1] for texts in references]
    _, whole = score_each(samples, guesses, metrics, seed=0, rules=Rules())
    _, part = score_each(samples[:30], guesses[:30], metrics, seed=0, rules=Rules(document_frequencies=table))
    assert [row["CIDEr"] for row in part] == pytest.approx([row["CIDEr"] for row in whole[:30]])


def different_captions(count=40):
    things = ["dog", "cat", "bird", "horse", "car", "tree", "boat"]
    return [
        [f"a {things[at % 7]} near {at} red houses", f"one {things[at % 7]} near {at} small houses"]
        for at in range(count)
    ]


def test_caption_scores_and_what_people_would_get(metrics):
    references = different_captions()
    samples = samples_from([caption(str(at), texts) for at, texts in enumerate(references)])
    perfect = score(samples, [texts[0] for texts in references], metrics)["caption"]
    poor = score(samples, ["a dog"] * len(references), metrics)["caption"]
    assert perfect["BLEU-4"] == pytest.approx(1.0) and perfect["ROUGE-L"] == pytest.approx(1.0)
    assert perfect["CIDEr_ceiling"] == pytest.approx(perfect["CIDEr"], rel=0.1)
    assert 0 < poor["CIDEr"] < poor["CIDEr_references"] < perfect["CIDEr"] <= 10
    assert perfect["n"] == 40
    for scores in (perfect, poor):
        for name in ("CIDEr", "BLEU-4", "ROUGE-L", "CIDEr_references"):
            low, high = scores["interval_95"][name]
            assert low - 1e-9 <= scores[name] <= high + 1e-9, name


def test_reference_agreement_leaves_each_reference_out_once(metrics):
    texts = different_captions(6)
    texts[0].append("a third caption of the first picture")
    alone = [["the only caption"]]
    rounds = []
    for left_out in range(3):
        places = [left_out % len(each) for each in texts]
        guesses = [each[place] for each, place in zip(texts, places, strict=True)]
        rest = [
            [text for at, text in enumerate(each) if at != place] for each, place in zip(texts, places, strict=True)
        ]
        rounds.append(metrics["cider"].compute(predictions=guesses, references=rest)["CIDEr"])
    assert np.mean(reference_agreement(texts + alone, metrics["cider"])) == pytest.approx(np.mean(rounds))
    assert reference_agreement(alone, metrics["cider"]) == []


def test_predictions_that_do_not_fit_the_samples_are_refused(metrics):
    with pytest.raises(ValueError):
        score(samples_from([vqa("a", "What?", "red")]), ["red", "blue"], metrics)


def test_the_interval_holds_the_mean_and_shrinks_with_more_samples():
    values = np.random.default_rng(0).random(2000) * 100
    few, many = (bootstrap_interval(values[:count]) for count in (20, 2000))
    assert few[0] < values[:20].mean() < few[1]
    assert many[0] < values.mean() < many[1]
    # Ten times narrower for a hundred times the samples.
    assert 7 < (few[1] - few[0]) / (many[1] - many[0]) < 14


def test_the_interval_is_the_one_of_a_plain_bootstrap():
    values = np.random.default_rng(1).random(50)
    draws = np.random.default_rng(2)
    plain = np.percentile([draws.choice(values, 50).mean() for _ in range(4000)], [2.5, 97.5])
    # The ends of two bootstraps of a thousand rounds and more differ by less than a tenth of the width.
    assert bootstrap_interval(values) == pytest.approx(plain, abs=0.1 * (plain[1] - plain[0]))


def test_the_interval_is_seeded_and_a_certain_score_has_none():
    values = [0, 100, 100, 0, 100]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(np.arange(5.0), seed=3)
    assert bootstrap_interval([100.0] * 9) == [100.0, 100.0]
