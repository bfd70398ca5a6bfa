"""The headline scores, the table and the pictures of a run."""

import pytest
from PIL import Image

from moevlm.reporting_moevlm import draw_losses, evenness, headlines, plot_run, table

SCORES = {
    "caption": {"CIDEr": 5.0, "n": 20, "interval_95": {"CIDEr": [4.0, 6.0]}},
    "vqa": {"vqa_accuracy": 90.0, "n": 30, "interval_95": {"vqa_accuracy": [85.5, 94.0]}},
}
EARLY = {"vision.0": [0.5, 0.5], "decoder.1": [0.6, 0.4, 0.0]}
LATE = {"vision.0": [0.9, 0.1], "decoder.1": [0.4, 0.3, 0.3]}
HISTORY = [
    {"step": 1, "loss": 3.0, "aux_loss": 1.1, "z_loss": 0.2, "expert_load": EARLY},
    {"step": 2, "loss": 2.0, "aux_loss": 1.0, "z_loss": 0.2, "expert_load": LATE},
    {"step": 2, "eval_loss": 2.5, "eval_score": 70.0, "eval_runtime": 1.0},
]


def test_the_score_for_the_best_checkpoint_is_the_mean_of_the_tasks_on_one_scale():
    assert headlines(SCORES) == {"eval_caption_CIDEr": 5.0, "eval_vqa_accuracy": 90.0, "eval_score": 70.0}


def test_the_table_has_a_line_for_each_score_with_interval_and_other_columns_beside():
    lines = table({"model": SCORES, "blind": {"vqa": {"vqa_accuracy": 40.0}}}).splitlines()
    assert lines[0].split() == ["task", "score", "model", "95", "%", "interval", "n", "blind"]
    assert lines[1].split() == ["caption", "CIDEr", "5.00", "4.00", "..", "6.00", "20", "-"]
    assert lines[2].split() == ["vqa", "vqa_accuracy", "90.00", "85.50", "..", "94.00", "30", "40.00"]


def test_a_score_of_some_samples_only_stands_beside_their_number():
    scores = {"vqa": SCORES["vqa"] | {"n_by_score": {"vqa_accuracy": 7}}}
    assert table({"model": scores}).split()[-1] == "7"


def test_every_picture_is_drawn_from_the_log_history(tmp_path):
    written = plot_run(HISTORY, tmp_path / "plots")
    assert sorted(path.name for path in written) == ["expert_load.png", "loss.png", "scores.png"]
    for path in written:
        assert min(Image.open(path).size) > 200


def test_gradient_norms_have_a_panel_with_a_line_for_each_part_that_learnt():
    norms = {"grad_norm_language": 1.0, "grad_norm_router": 0.1}
    figure = draw_losses([{"step": step, "loss": 1.0, **norms} for step in (1, 2)])
    assert [axes.get_title() for axes in figure.axes] == ["loss", "gradient norms"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["language", "router"]


def test_a_history_without_numbers_gives_no_picture(tmp_path):
    assert plot_run([{"step": 1, "train_runtime": 3.0}], tmp_path) == []


@pytest.mark.parametrize(("shares", "value"), [([0.25] * 4, 1.0), ([1.0, 0.0], 0.0)])
def test_evenness_is_one_for_equal_shares_and_zero_for_one_expert(shares, value):
    assert evenness(shares) == pytest.approx(value)
