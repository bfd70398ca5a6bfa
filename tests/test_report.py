# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The report page: whole in itself, true to the numbers, and looked at by a browser where there is one."""

import shutil
import subprocess
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from asked_records import caption, chat, vqa
from PIL import Image

from moevlm import report_moevlm
from moevlm.evaluation_moevlm import bootstrap_interval, samples_from
from moevlm.report_moevlm import by_kind, draw_samples, page, plot_scores, save_figures, without_interval

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GREEN = (10, 200, 30)


def row(name, score, task="vqa", **more):
    told = {"task": task, "id": name, "metric": "vqa_accuracy", "question": f"What is {name}?", "prediction": "red"}
    told |= {"target": "red", "references": [], "answers": [["red", 10]], "scores": {"vqa_accuracy": score}}
    return told | more


@pytest.fixture
def rows():
    return [row(f"q{at}", 100.0 if at % 4 else 0.0, answer_type=("colour", "shape")[at % 2]) for at in range(40)]


@pytest.fixture
def columns(rows):
    scores = {"vqa_accuracy": 75.0, "n": 40, "interval_95": {"vqa_accuracy": [62.5, 87.5]}}
    return {"test": {"vqa": scores}, "blind": {"vqa": {"vqa_accuracy": 31.25}}}


def make(columns, rows, picture=None, **more):
    figures = plot_scores(columns, rows, by_kind(rows, bootstrap_interval))
    about = {"model": "a <model>", "data": "data.yaml"}
    picture = picture or Image.new("RGB", (40, 30), GREEN)
    return page(columns, rows, figures, about=about, notes=["2 <odd> rows"], pictures=lambda place: [picture], **more)


class Reader(HTMLParser):
    """The tags that are open at the end, the addresses a browser would fetch, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_in_itself(columns, rows):
    html = make(columns, rows)
    read = Reader(html)
    assert not read.open
    assert len(read.addresses) > 10 and all(address.startswith("data:image/") for address in read.addresses)
    assert "http" not in html and "url(" not in html and "<script" not in html


def test_what_models_and_people_say_is_text_and_never_markup(columns, rows):
    rows[0] |= {"prediction": "<b onload=x>&", "question": "<script>1</script>", "answers": [["<i>", 1]]}
    html = make(columns, rows)
    assert "<script" not in html and "onload=x>" not in html.replace("onload=x&gt;", "")
    text = Reader(html).text
    assert "<script>1</script>" in text and "<b onload=x>&" in text and "2 <odd> rows" in text and "a <model>" in text


def test_the_table_tells_each_score_its_interval_and_the_baselines(columns, rows):
    text = Reader(make(columns, rows)).text
    for cell in ("vqa_accuracy", "75.00", "62.50 .. 87.50", "31.25", "on noise instead of pictures"):
        assert cell in text
    columns["test"]["vqa"] |= {"n_by_score": {"vqa_accuracy": 1234}, "CIDEr_ceiling": 7.5}
    text = Reader(make(columns, rows)).text
    assert "1,234" in text and "A copy of each picture's best reference would get CIDEr 7.50." in text


def test_the_worst_and_the_best_samples_are_shown_with_their_pictures(columns, rows):
    rows[21]["scores"]["vqa_accuracy"], rows[7]["scores"]["vqa_accuracy"] = -1.0, 101.0
    html = make(columns, rows, count=3)
    worst, best = html.split("<h3>")[1:]
    assert worst.startswith("Worst") and "q21 " in worst and worst.count('class="card"') == 3
    assert best.startswith("Best") and "q7 " in best and best.count('class="card"') == 3
    assert worst.count("data:image/png") == 3


def test_equal_samples_are_taken_from_all_over_and_never_shown_twice(columns, rows):
    worst, best = make(columns, rows, count=4).split("<h3>")[1:]
    shown = [{at for at in range(40) if f">q{at} " in part} for part in (worst, best)]
    assert shown[0] <= set(range(0, 40, 4)) and max(shown[0]) - min(shown[0]) > 20
    assert len(shown[1]) == 4 and not shown[0] & shown[1] and max(shown[1]) - min(shown[1]) > 20


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_equal_samples_makes_a_page(columns, rows, count):
    html = make(columns, [each | {"scores": {"vqa_accuracy": 100.0}} for each in rows[:count]])
    assert html.count('class="card"') == count


def test_large_pictures_are_made_small(columns, rows):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    html = make(columns, rows, Image.fromarray(noise), count=2)
    # Four pictures of 320x240 noise as JPEG, not of 2000x1500.
    assert "image/jpeg" in html and len(html) < 1_000_000


def test_kinds_are_averaged_with_their_intervals(rows):
    rows.append(row("d", 50.0, task="chat", turn=2))
    kinds = by_kind(rows, lambda values: [min(values), max(values)])
    assert kinds["vqa"] == {
        "answer_type": {
            "colour": {"n": 20, "vqa_accuracy": 50.0, "interval_95": [0.0, 100.0]},
            "shape": {"n": 20, "vqa_accuracy": 100.0, "interval_95": [100.0, 100.0]},
        }
    }
    assert kinds["chat"] == {"turn": {"2": {"n": 1, "vqa_accuracy": 50.0, "interval_95": [50.0, 50.0]}}}


def test_plots_replace_those_of_an_earlier_report_and_nothing_else(columns, rows, tmp_path):
    for name in ("chat_turn.png", "loss.png"):
        (tmp_path / name).write_bytes(b"")
    save_figures(plot_scores(columns, rows, by_kind(rows, bootstrap_interval)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"vqa_spread.png", "vqa_answer_type.png", "loss.png"}


def test_a_section_holds_the_plots_of_its_own_task(columns, rows):
    scores = next(iter(columns.values()))
    columns = {"test": {"vqa": scores["vqa"], "vqa_short": scores["vqa"]}}
    html = page(
        columns, rows, {"vqa_short_spread.png": b"", "vqa_spread.png": b""}, about={}, notes=(), pictures=lambda at: []
    )
    first, second = html.split("<h2>vqa_short</h2>")
    assert 'alt="vqa_spread.png"' in first and 'alt="vqa_short_spread.png"' not in first
    assert 'alt="vqa_short_spread.png"' in second


def test_very_many_kinds_still_make_a_plot(columns):
    rows = [row(str(at), 50.0, question_type=f"kind ${at}$ {'x' * 60}") for at in range(200)]
    kinds = by_kind(rows, bootstrap_interval)["vqa"]["question_type"]
    axes = report_moevlm._bars("vqa", "question type", kinds).axes[0]
    assert "the 30 commonest of 200" in axes.get_title() and len(axes.patches) == 30
    assert plot_scores(columns, rows, {"vqa": {"question_type": kinds}})["vqa_question_type.png"].startswith(b"\x89PNG")


def test_scores_without_an_interval_are_told():
    scores = {"caption": {"METEOR": 0.25, "interval_95": {}}, "vqa": {"interval_95": {}}}
    (note,) = without_interval(scores, ["METEOR"])
    assert note.startswith("caption: METEOR 0.2500")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_the_page(columns, rows, tmp_path):
    (tmp_path / "report.html").write_text(make(columns, rows), encoding="utf-8")
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1600", f"--screenshot={picture}"]
    address = (tmp_path / "report.html").as_uri()
    subprocess.run([BROWSER, *flags, address], check=True, timeout=120, capture_output=True)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[:2] == (1600, 1100)
    cards = np.abs(pixels - np.array(GREEN)).max(-1) < 3
    bars = np.abs(pixels - np.array((42, 111, 176))).max(-1) < 3
    assert cards.sum() > 50_000 and bars.sum() > 5_000, "the samples' pictures and the bars are seen"
    assert len({tuple(pixel) for pixel in pixels[:60, :400].reshape(-1, 3)}) > 10, "there is a title"


def test_the_page_shows_samples_of_every_task(tmp_path):
    records = [vqa(str(at), "What costs $5 and $6?", "red") for at in range(30)]
    records += [chat("d", "What?", "a dog"), caption("c", ["a $ sign"])]
    samples = samples_from(records)
    for name, answer in (("page.part", "red $x$"), ("long.part", "red $x$ " * 600)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # matplotlib's, where texts leave no room for the pictures
            draw_samples(samples, [answer] * len(samples), str(tmp_path / name))
    with Image.open(tmp_path / "page.part") as page, Image.open(tmp_path / "long.part") as long:
        assert page.format == "PNG"
        for pixels in (np.asarray(each.convert("RGB")) for each in (page, long)):
            for colour in ((192, 39, 29), (31, 78, 140)):  # the frames of a wrong answer and of a caption
                assert (np.abs(pixels - np.array(colour)).max(-1) < 3).sum() > 500
