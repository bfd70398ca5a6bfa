"""The metric modules against the official scores.

`fixtures/metrics/coco_caption.json` holds captions of our own and what pycocoevalcap 1.2 makes of them (tokens, and
scores for each image), so that Java is not needed. Where pycocoevalcap and Java are found, the last test asks anew; it
scores as the file was made: one PTBTokenizer call on all captions, then Cider(), Bleu(4) and Rouge().
`fixtures/metrics/vqa_accuracy.json` holds answers of our own and what the official rules make of them; it says how.
"""

import contextlib
import importlib.util
import io
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import evaluate
import pytest

METRICS = Path(__file__).resolve().parent.parent / "metrics"
GOLDEN = json.loads((Path(__file__).parent / "fixtures/metrics/coco_caption.json").read_text(encoding="utf-8"))
GOLDEN_VQA = json.loads((Path(__file__).parent / "fixtures/metrics/vqa_accuracy.json").read_text(encoding="utf-8"))
PAIRS = {"predictions": GOLDEN["predictions"], "references": GOLDEN["references"]}
BLEU = [f"BLEU-{order}" for order in range(1, 5)]


@pytest.fixture(scope="module")
def cider():
    return evaluate.load(str(METRICS / "cider"))


@pytest.fixture(scope="module")
def overlap():
    return evaluate.load(str(METRICS / "caption_overlap"))


@pytest.fixture(scope="module")
def vqa():
    return evaluate.load(str(METRICS / "vqa_accuracy"))


@pytest.fixture(scope="module")
def tokenize():
    spec = importlib.util.spec_from_file_location("ptb_tokenizer", METRICS / "cider/ptb_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.tokenize


@pytest.mark.parametrize("name", ["cider", "caption_overlap", "vqa_accuracy"])
def test_a_metric_loads_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(str(METRICS / name))
    pairs = {"predictions": ["a dog"] * 30, "references": [["a dog"] * 10] * 30}
    assert metric.compute(**pairs) == metric.compute(**pairs)


def test_both_tokenizers_are_the_same_file():
    copies = [(METRICS / name / "ptb_tokenizer.py").read_bytes() for name in ("cider", "caption_overlap")]
    assert copies[0] == copies[1]


def test_tokens_equal_the_official_ones(tokenize):
    wrong = {caption: (tokenize(caption), line) for caption, line in GOLDEN["tokens"] if tokenize(caption) != line}
    assert not wrong


@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_a_line_separator_is_a_space(tokenize, separator):
    assert tokenize(f"A dog{separator}runs.") == "a dog runs"


def test_repetition_does_not_blow_up_the_patterns(tokenize):
    # A pattern that backtracks exponentially would hang here; each of these takes milliseconds.
    for piece in ("a-", "a.", "a'", "x", "<a ", "@a", "1,", "a/", "&a;", "n't", "(555) "):
        assert tokenize(piece * 2000) is not None


def test_cider_equals_the_official_score(cider):
    result = cider.compute(**PAIRS, per_item=True)
    assert result["CIDEr"] == pytest.approx(GOLDEN["CIDEr"]["score"], abs=1e-12)
    assert result["per_item"] == pytest.approx(GOLDEN["CIDEr"]["per_item"], abs=1e-12)


def test_bleu_and_rouge_equal_the_official_scores(overlap):
    result = overlap.compute(**PAIRS, per_item=True)
    for name in [*BLEU, "ROUGE-L"]:
        assert result[name] == pytest.approx(GOLDEN[name]["score"], abs=1e-12)
        assert [item[name] for item in result["per_item"]] == pytest.approx(GOLDEN[name]["per_item"], abs=1e-12)


def test_counts_of_all_items_add_up_to_the_whole_bleu(overlap):
    module = sys.modules[type(overlap).__module__]
    result = overlap.compute(**PAIRS, per_item=True)
    rows = [module.BleuCounts(*(item[field] for field in module.BleuCounts._fields)) for item in result["per_item"]]
    assert module.bleu(rows) == [result[name] for name in BLEU]


def test_longest_common_subsequence_equals_the_table(overlap):
    def table(first, second):
        lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
        return lengths[-1][-1]

    draw = random.Random(0)
    lines = [draw.choices("abcd", k=draw.randrange(90)) for _ in range(40)]
    fast = sys.modules[type(overlap).__module__].longest_common_subsequence
    for words in lines:
        assert fast(words, lines) == [table(words, other) for other in lines]


def distinct(length, count=30):
    return [" ".join(f"w{image}n{position}" for position in range(length)) for image in range(count)]


@pytest.mark.parametrize("length, highest", [(1, 2.5), (2, 5.0), (3, 7.5), (4, 10.0), (9, 10.0)])
def test_a_copy_of_the_only_reference_scores_what_its_length_allows(cider, length, highest):
    captions = distinct(length)
    result = cider.compute(predictions=captions, references=[[caption] for caption in captions], ceiling=True)
    assert result == {"CIDEr": pytest.approx(highest), "ceiling": pytest.approx(highest)}


def test_ceiling_is_the_mean_of_the_best_references(cider):
    references = PAIRS["references"]
    rounds = [
        cider.compute(predictions=list(column), references=references, per_item=True)["per_item"]
        for column in zip(*([*captions, *captions * 5][:5] for captions in references))
    ]
    best = [max(scores) for scores in zip(*rounds)]
    result = cider.compute(predictions=[""] * len(references), references=references, ceiling=True)
    assert result == {"CIDEr": 0.0, "ceiling": pytest.approx(sum(best) / len(best))}


def test_few_images_warn_and_many_do_not(cider):
    with pytest.warns(UserWarning, match="CIDEr over 1 images"):
        assert cider.compute(predictions=["a dog"], references=[["a dog"]])["CIDEr"] == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cider.compute(**PAIRS)


def test_a_stored_table_makes_scores_of_shards_add_up(cider):
    table = json.loads(json.dumps(cider.document_frequencies(PAIRS["references"])))
    whole = cider.compute(**PAIRS, per_item=True)["per_item"]
    shards = []
    for start in range(0, len(whole), 10):
        part = {name: column[start : start + 10] for name, column in PAIRS.items()}
        shards += cider.compute(**part, per_item=True, document_frequencies=table)["per_item"]
    assert shards == pytest.approx(whole, abs=1e-12)


def test_a_wrong_table_is_refused(cider):
    with pytest.raises(ValueError, match="document_frequencies must be"):
        cider.compute(**PAIRS, document_frequencies={"a dog": 3})


@pytest.mark.parametrize("name", ["cider", "overlap", "vqa"])
def test_nothing_to_score_is_an_error(name, request):
    with pytest.raises(ValueError, match="predictions is empty"):
        request.getfixturevalue(name).compute(predictions=[], references=[])


@pytest.mark.parametrize("name", ["cider", "overlap"])
def test_an_image_without_references_is_named(name, request):
    with pytest.raises(ValueError, match=r"references\[1\]=\[\]"):
        request.getfixturevalue(name).compute(predictions=["a", "b"], references=[["a"], []])


@pytest.mark.parametrize("name", ["cider", "overlap", "vqa"])
def test_a_missing_prediction_is_named(name, request):
    with pytest.raises(ValueError, match=r"predictions\[1\] is None"):
        request.getfixturevalue(name).compute(predictions=["a", None], references=[["a"] * 10, ["b"] * 10])


def answer_with(vqa, prediction, answers, **options):
    return vqa.compute(predictions=[prediction], references=[answers], **options)["vqa_accuracy"]


@pytest.mark.parametrize("matches, percent", [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (10, 100.0)])
def test_agreement_is_left_one_out(vqa, matches, percent):
    assert answer_with(vqa, "cat", ["cat"] * matches + ["dog"] * (10 - matches)) == percent


def test_accuracy_equals_the_dumb_loop(vqa):
    def dumb(prediction, answers):
        agreements = []
        for left_out in range(len(answers)):
            others = answers[:left_out] + answers[left_out + 1 :]
            agreements.append(min(1, sum(answer == prediction for answer in others) / 3))
        return round(100 * sum(agreements) / len(agreements), 2)

    draw = random.Random(0)
    predictions = draw.choices(["cat", "dog", "cow"], k=60)
    references = [draw.choices(["cat", "dog", "cow"], k=draw.randint(4, 12)) for _ in predictions]
    result = vqa.compute(predictions=predictions, references=references)
    assert result["per_question"] == [dumb(*pair) for pair in zip(predictions, references)]


@pytest.mark.parametrize(
    "prediction, reading",
    [
        ("A Dog", "dog"),
        ("the two dogs.", "2 dogs"),
        ("none", "0"),
        ("isnt", "isn't"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),
        ("dog's", "dog's"),
        ("5.", "5"),
        ("2.5", "2.5"),
        ("p.m.", "pm"),
        ("red/blue", "red blue"),
        ("red / blue", "red  blue"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("10:30", "10:30"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("3-4, maybe", "3 4 maybe"),
        ("\tyes\n", "yes"),
        ("." * 33 + "x", ".x"),
    ],
)
def test_answers_are_normalised_as_officially(vqa, prediction, reading):
    # The tenth answer differs, so that the official rule normalises at all; its reading is normalised like the rest.
    normalise = sys.modules[type(vqa).__module__].normalise
    assert normalise(prediction.strip()) == " ".join(reading.split())
    assert answer_with(vqa, prediction, [prediction] * 9 + ["elephant"]) == 100.0


@pytest.mark.parametrize("normalize", ["official", "always"])
def test_accuracy_equals_the_official_one_on_every_question(vqa, normalize):
    given = {name: GOLDEN_VQA[name] for name in ("predictions", "references", "question_types", "answer_types")}
    assert len(given["predictions"]) == 400
    assert vqa.compute(**given, normalize=normalize) == GOLDEN_VQA[normalize]


def test_contractions_are_the_official_count(vqa):
    # The official list has 120 entries: six of them change nothing ("let's", "she's" and four with a capital I).
    assert len(sys.modules[type(vqa).__module__].RESTORED) == 114


def test_agreeing_annotators_are_compared_raw_unless_always_normalised(vqa):
    assert answer_with(vqa, "Yes", ["yes"] * 10) == 0.0
    assert answer_with(vqa, "Yes", ["yes"] * 10, normalize="always") == 100.0
    assert answer_with(vqa, "Yes", ["yes"] * 9 + ["no"]) == 100.0


def test_accuracy_is_broken_down_by_type(vqa):
    result = vqa.compute(
        predictions=["yes", "2", "red"],
        references=[["yes"] * 10, ["2"] + ["3"] * 9, ["blue"] * 10],
        question_types=["is the", "how many", None],
        answer_types=["yes/no", "number", "other"],
    )
    assert result == {
        "vqa_accuracy": 43.33,
        "per_question": [100.0, 30.0, 0.0],
        "per_question_type": {"is the": 100.0, "how many": 30.0},
        "per_answer_type": {"yes/no": 100.0, "number": 30.0, "other": 0.0},
    }


def test_vqa_mistakes_are_explained(vqa):
    with pytest.raises(ValueError, match="question_types has 2 entries for 1 predictions"):
        answer_with(vqa, "yes", ["yes"] * 10, question_types=["a", "b"])
    with pytest.raises(ValueError, match='normalize="never" is unknown'):
        answer_with(vqa, "yes", ["yes"] * 10, normalize="never")
    with pytest.raises(ValueError, match="repeat a single ground truth ten times"):
        answer_with(vqa, "yes", ["yes"])
    with pytest.warns(UserWarning, match="only 2 answers"):
        assert answer_with(vqa, "yes", ["yes", "yes"]) == 33.33


def test_an_unknown_java_metric_is_answered_with_the_known_ones(overlap):
    with pytest.raises(ValueError, match='"CIDEr" is unknown; choose among METEOR, SPICE'):
        overlap.compute(**PAIRS, java_metrics=["CIDEr"])


def test_java_metrics_say_what_they_need_and_that_the_others_do_not(overlap, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match="METEOR is a Java program.* needs Java on the PATH.*CIDEr, BLEU and ROUGE-L"):
        overlap.compute(**PAIRS, java_metrics=["METEOR"])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="it needs pip install pycocoevalcap"):
        overlap.compute(**PAIRS, java_metrics=["METEOR"])


def test_java_metrics_stand_beside_the_others(overlap, monkeypatch):
    module = sys.modules[type(overlap).__module__]
    seen = []

    class Program:
        def compute_score(self, gts, res):
            seen.append((gts, res))
            return 0.5, [0.25 * at for at in res]

    monkeypatch.setattr(module, "check_java_metrics", lambda names: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: type("meteor", (), {"Meteor": Program}))
    pairs = {"predictions": ["A dog.", "two ||| cats"], "references": [["a dog"], ["Cats!", "two cats"]]}
    result = overlap.compute(**pairs, java_metrics=["METEOR"], per_item=True)
    # METEOR's program takes "|||" for the border between texts; no token is that.
    assert seen == [({0: ["a dog"], 1: ["cats", "two cats"]}, {0: ["a dog"], 1: ["two | | | cats"]})]
    assert result["METEOR"] == 0.5 and [item["METEOR"] for item in result["per_item"]] == [0.0, 0.25]
    assert result["BLEU-1"] == overlap.compute(**pairs)["BLEU-1"]


def test_a_java_program_that_fails_says_why(overlap, monkeypatch):
    module = sys.modules[type(overlap).__module__]

    class Program:
        def compute_score(self, gts, res):
            raise OSError("no network")

    monkeypatch.setattr(module, "check_java_metrics", lambda names: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: type("spice", (), {"Spice": Program}))
    with pytest.raises(RuntimeError, match="SPICE failed .*no network.*downloads a parser"):
        overlap.compute(**PAIRS, java_metrics=["SPICE"])


OFFICIAL = importlib.util.find_spec("pycocoevalcap") and shutil.which("java")


@pytest.mark.skipif(not OFFICIAL, reason="needs pycocoevalcap and Java")
def test_the_official_scorer_still_agrees(cider, overlap, tokenize):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # Golden captions in new company: each image gets four others and its own as references.
    captions = [caption for caption, _ in GOLDEN["tokens"]]
    references = [[*random.Random(caption).sample(captions, 4), caption] for caption in captions]
    predictions = [random.Random(caption).choice(own) for caption, own in zip(captions, references)]
    official = PTBTokenizer()
    gts = official.tokenize({i: [{"caption": text} for text in own] for i, own in enumerate(references)})
    res = official.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    assert [[tokenize(text) for text in own] for own in references] == list(gts.values())
    with contextlib.redirect_stdout(io.StringIO()):
        scores = [scorer.compute_score(gts, res)[0] for scorer in (Cider(), Bleu(4), Rouge())]
    assert cider.compute(predictions=predictions, references=references)["CIDEr"] == pytest.approx(scores[0])
    ours = overlap.compute(predictions=predictions, references=references)
    assert [ours[name] for name in BLEU] == pytest.approx(scores[1])
    assert ours["ROUGE-L"] == pytest.approx(scores[2])


@pytest.mark.slow
@pytest.mark.skipif(not OFFICIAL, reason="needs pycocoevalcap and Java")
def test_meteor_is_the_official_programs(overlap, tokenize):
    from pycocoevalcap.meteor.meteor import Meteor

    ours = overlap.compute(**PAIRS, java_metrics=["METEOR"])["METEOR"]
    copies = overlap.compute(
        predictions=[own[0] for own in PAIRS["references"]], references=PAIRS["references"], java_metrics=["METEOR"]
    )
    gts = {at: [tokenize(text) for text in own] for at, own in enumerate(PAIRS["references"])}
    res = {at: [tokenize(text)] for at, text in enumerate(PAIRS["predictions"])}
    assert ours == pytest.approx(Meteor().compute_score(gts, res)[0], abs=1e-12)
    assert copies["METEOR"] > ours
