# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The paired comparison of two runs against plain arithmetic."""

from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import pytest

from moevlm.comparison_moevlm import as_text, compare
from moevlm.evaluation_moevlm import bootstrap_interval, statistic_of

CIDER = evaluate.load(str(Path(__file__).resolve().parent.parent / "metrics/cider"))
HAND_IN = {"interval": bootstrap_interval, "statistic_of": statistic_of, "cider": CIDER}


def row(name, score, prediction="red", task="vqa", **scores):
    told = {"task": task, "id": name, "metric": "vqa_accuracy", "question": "What?", "target": "red"}
    told |= {"references": [], "answers": [["red", 10]], "rules": {"idf": None, "normalize": "official"}}
    return told | {"prediction": prediction, "scores": {"vqa_accuracy": score, **scores}}


def captions(said, references):
    """A run's captions, with CIDEr as a run of just these gives it."""
    values = CIDER.compute(predictions=said, references=references, per_item=True)["per_item"]
    return [
        row(str(at), 0, prediction=text, task="caption")
        | {"metric": "CIDEr", "references": each, "scores": {"CIDEr": value}}
        for at, (text, each, value) in enumerate(zip(said, references, values))
    ]


def rows(scores):
    return [row(str(at), score, prediction=f"says {score}") for at, score in enumerate(scores)]


def test_difference_and_wins_by_hand():
    found = compare(rows([100, 0, 60, 0]), rows([0, 100, 60, 30]), **HAND_IN)["vqa"]
    score = found["scores"]["vqa_accuracy"]
    assert (score["first"], score["second"], score["difference"], score["n"]) == (40.0, 47.5, 7.5, 4)
    assert (score["wins"], score["ties"], score["losses"]) == (2, 1, 1)
    assert [(change["id"], change["gain"]) for change in found["changed"]] == [("0", -100), ("3", 30), ("1", 100)]
    assert found["changed"][0]["first"] == "says 100" and found["changed"][0]["second"] == "says 0"


def test_the_interval_is_that_of_resampled_pairs():
    draws = np.random.default_rng(0)
    hard = draws.random(300) * 100
    first, second = np.round(hard), np.round(hard + draws.normal(2, 5, 300))
    score = compare(rows(first.tolist()), rows(second.tolist()), **HAND_IN)["vqa"]["scores"]["vqa_accuracy"]
    gaps = second - first
    plain = np.percentile([draws.choice(gaps, 300).mean() for _ in range(4000)], [2.5, 97.5])
    # Two bootstraps of a thousand rounds and more differ by less than a tenth of the width.
    assert score["interval_95"] == pytest.approx(plain, abs=0.1 * (plain[1] - plain[0]))
    apart = bootstrap_interval(second)
    assert score["interval_95"][1] - score["interval_95"][0] < 0.5 * (apart[1] - apart[0]), "pairing helps"


def test_a_run_does_not_differ_from_itself():
    found = compare(rows([100, 0, 30]), rows([100, 0, 30]), **HAND_IN)["vqa"]
    score = found["scores"]["vqa_accuracy"]
    assert score["difference"] == 0 and score["interval_95"] == [0, 0] and score["ties"] == 3
    assert found["changed"] == []


def test_swapping_the_runs_turns_the_signs():
    first, second = rows([100, 0, 60, 0]), rows([0, 100, 60, 30])
    there, back = (
        compare(*pair, **HAND_IN)["vqa"]["scores"]["vqa_accuracy"] for pair in ((first, second), (second, first))
    )
    assert there["difference"] == -back["difference"] and there["wins"] == back["losses"]
    assert there["interval_95"] == pytest.approx([-end for end in reversed(back["interval_95"])], abs=15)


def test_bleu_differs_by_the_scores_of_the_whole_sets():
    good, poor = [4, 3, 2, 1, 4, 3, 2, 1, 4, 4], [4, 2, 1, 0, 5, 4, 3, 2, 5, 4]
    first = [row(str(at), 0, **{"BLEU-4": poor}) for at in range(8)]
    second = [row(str(at), 0, **{"BLEU-4": good if at % 2 else poor}) for at in range(8)]
    score = compare(first, second, **HAND_IN)["vqa"]["scores"]["BLEU-4"]
    bleu = statistic_of("BLEU-4")
    mixed = bleu(np.array([np.mean([good, poor], axis=0)]))[0]
    assert score["second"] == pytest.approx(mixed) and score["first"] == pytest.approx(bleu(np.array([poor]))[0])
    assert (score["wins"], score["ties"], score["losses"]) == (4, 4, 0)
    assert score["interval_95"][0] < score["difference"] < score["interval_95"][1]


def test_scores_of_some_samples_only_are_paired_there():
    first = [row("0", 0, refers_back_accuracy=0.0), row("1", 0)]
    second = [row("0", 0, refers_back_accuracy=100.0), row("1", 0)]
    scores = compare(first, second, **HAND_IN)["vqa"]["scores"]
    assert scores["refers_back_accuracy"]["n"] == 1 and scores["vqa_accuracy"]["n"] == 2


def test_samples_of_one_run_only_are_named():
    found = compare(rows([100, 0, 60]), rows([100, 0])[::-1] + [row("x", 0)], **HAND_IN)
    assert found["vqa"]["unpaired"] == {"first": ["2"], "second": ["x"]}
    text = as_text(found, ("old", "new"), shown=3)
    assert "1 samples only in the first run are left out: 2" in text
    assert "1 samples only in the second run are left out: x" in text


def test_runs_of_different_data_are_refused():
    with pytest.raises(ValueError, match="share no sample"):
        compare(rows([1]), [row("other", 1)], **HAND_IN)
    for other in ({"target": "blue"}, {"references": ["blue"]}, {"answers": [["red", 9]]}):
        with pytest.raises(ValueError, match="1 samples have another question or truth .* such as vqa 0"):
            compare(rows([1]), [rows([1])[0] | other], **HAND_IN)


def test_captions_of_other_sets_are_scored_by_the_shared_ones():
    references = [[f"a {colour} {thing} lies here"] for colour in ("red", "blue") for thing in ("box", "ball", "hat")]
    said = ["a red box lies here", "a blue ball", "a red hat", "a blue box lies here", "a ball", "a hat lies here"]
    few = captions(said[:3], references[:3])
    many = captions(["a blue box", *said[1:]], references)
    assert few[1]["scores"] != many[1]["scores"], "each run's document frequencies are its own"
    found = compare(few, many, **HAND_IN)["caption"]
    expected = captions(["a blue box", *said[1:3]], references[:3])
    score, gain = found["scores"]["CIDEr"], expected[0]["scores"]["CIDEr"] - few[0]["scores"]["CIDEr"]
    assert (score["wins"], score["ties"], score["losses"], score["n"]) == (0, 2, 1, 3)
    assert score["difference"] == pytest.approx(gain / 3) and found["changed"][0]["gain"] == pytest.approx(gain)
    table = [[each | {"rules": {"idf": "0a", "normalize": "official"}} for each in run] for run in (few, many)]
    kept = compare(*table, **HAND_IN)["caption"]["scores"]["CIDEr"]
    assert kept["ties"] == 0, "with one table of document frequencies the scores stand"


@pytest.mark.parametrize(("name", "value"), [("idf", "0a"), ("normalize", "always")])
def test_runs_of_other_rules_are_refused(name, value):
    first, second = rows([1]), rows([1])
    second[0]["rules"] = second[0]["rules"] | {name: value}
    with pytest.raises(ValueError, match=f"vqa: {name} is .* in the first run and '{value}' in the second"):
        compare(first, second, **HAND_IN)


def test_tasks_are_compared_apart():
    first, second = rows([0, 0]), rows([100, 0])
    first.append(row("0", 0, task="ocr"))
    second.append(row("0", 100, task="ocr"))
    found = compare(first, second, **HAND_IN)
    assert found["vqa"]["scores"]["vqa_accuracy"]["difference"] == 50
    assert found["ocr"]["scores"]["vqa_accuracy"]["difference"] == 100


def test_what_only_rounding_changes_is_not_sure():
    # BLEU-4 of captions without a common word is not 0 but 1e-12, which differs with the captions' lengths.
    first, second = ([row(str(at), 0, noise=noise) for at in range(9)] for noise in (3e-12, 2e-12))
    text = as_text(compare(first, second, **HAND_IN), ("old", "new"), shown=0)
    (line,) = [line for line in text.splitlines() if "noise" in line]
    assert "0/9/0" in line and line.endswith("no")


def test_the_text_shows_the_table_and_the_largest_changes():
    interval = partial(bootstrap_interval, seed=1)
    first, second = rows([100] * 30 + [0] * 2), rows([100] * 20 + [0] * 10 + [100] * 2)
    text = as_text(compare(first, second, **HAND_IN | {"interval": interval}), ("old", "new"), shown=2)
    assert "93.75  68.75  -25.00" in text and "2/20/10" in text
    assert text.count("  lost -100.00") == 2 and text.count("  won +100.00") == 2
    assert "old: says 100" in text and "new: says 0" in text and "vqa: 12 answers changed" in text
