# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The report of a scored model: one page that needs no network, its plots, and a picture of some samples."""

import base64
import io
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from .evaluation_moevlm import same_answer

Row = Mapping[str, Any]
# What scores are broken down by, where the samples know it; the order of the plots.
KINDS = {"answer_type": "answer type", "question_type": "question type", "turn": "turn of the dialogue"}
# More bars than this are not read; the rarest types are left to metrics.json.
MOST_BARS = 30
LONGEST_SIDE = 320
BLUE, GREY = "#2a6fb0", "#9aa4ad"
COLUMNS = {
    "blind": "on noise instead of pictures",
    "text_only": "without pictures",
    "question_only": "commonest training answer",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d232a; --soft: #5b6670; --line: #d9dee3; --page: #fff; --card: #f6f8fa;
  --good: #1b7f3b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a2adb7; --line: #39424b; --page: #14181c;
  --card: #1d2329; --good: #6fcf8b; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 1080px; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
.soft { color: var(--soft); }
li { white-space: pre-line; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
img.plot { max-width: 100%; background: #fff; border-radius: 6px; margin: .5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem;
  overflow-wrap: anywhere; }
.card img { width: 100%; max-height: 220px; object-fit: contain; image-rendering: auto; }
.card img.small { image-rendering: pixelated; }
.card p { margin: .3rem 0; }
.good { color: var(--good); } .bad { color: var(--bad); }
"""


def by_kind(rows: Sequence[Row], interval: Callable[[Sequence[float]], Sequence[float]]) -> dict[str, Any]:
    """The first score of each task for each kind of sample, with its interval: by task, attribute and kind.

    Args:
        rows: Answers with their scores, as `run_eval.py` writes them into samples.jsonl.
        interval: The bootstrap interval of a mean.
    """
    groups: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    metrics = {row["task"]: row["metric"] for row in rows}
    for row in rows:
        for name in KINDS:
            if name in row:
                groups[row["task"]][name][str(row[name])].append(row["scores"][row["metric"]])
    return {
        task: {
            name: {
                kind: {"n": len(each), metrics[task]: float(np.mean(each)), "interval_95": list(interval(each))}
                for kind, each in kinds.items()
            }
            for name, kinds in named.items()
        }
        for task, named in groups.items()
    }


def plot_scores(columns: Mapping[str, Any], rows: Sequence[Row], kinds: Mapping[str, Any]) -> dict[str, bytes]:
    """The plots as PNG by file name: the spread of each task's scores, and bars for each kind of sample."""
    figures = {}
    for task in next(iter(columns.values())):
        figures[f"{task}_spread.png"] = _png(_spread(task, [row for row in rows if row["task"] == task]))
        for name, found in kinds.get(task, {}).items():
            if len(found) > 1:
                figures[f"{task}_{name}.png"] = _png(_bars(task, KINDS[name], found))
    return figures


def _spread(task: str, rows: Sequence[Row]) -> Figure:
    metric = rows[0]["metric"]
    values = np.array([row["scores"][metric] for row in rows])
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=20, range=(0, 10 if metric == "CIDEr" else 100), color=BLUE)
    axes.axvline(values.mean(), color="black", linewidth=1)
    axes.set(title=f"{task}: {metric} of the samples (line: mean {values.mean():.2f})", xlabel=metric, ylabel="samples")
    return figure


def _bars(task: str, title: str, found: Mapping[str, Any]) -> Figure:
    (metric,) = {name for one in found.values() for name in one} - {"n", "interval_95"}
    shown = sorted(found, key=lambda kind: -found[kind]["n"])[:MOST_BARS]
    shown = shown if title.startswith("turn") else sorted(shown, key=lambda kind: -found[kind][metric])
    figure = Figure(figsize=(7.5, 1.1 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(shown):
        one = found[kind]
        low, high = one["interval_95"]
        error = [[max(0.0, one[metric] - low)], [max(0.0, high - one[metric])]]
        axes.barh(place, one[metric], color=BLUE, xerr=error, error_kw={"ecolor": "black", "capsize": 2, "lw": 1})
    labels = [f"{kind[:40]} ({found[kind]['n']})" for kind in shown]
    axes.set_yticks(range(len(shown)), labels, parse_math=False)
    left = f", the {MOST_BARS} commonest of {len(found)}" if len(found) > MOST_BARS else ""
    axes.set(title=f"{task} by {title}{left}", xlabel=f"{metric}, with 95 % intervals", ylim=(len(shown) - 0.4, -0.6))
    axes.grid(axis="x", alpha=0.3)
    return figure


def page(
    columns: Mapping[str, Any],
    rows: Sequence[Row],
    figures: Mapping[str, bytes],
    *,
    about: Mapping[str, Any],
    notes: Sequence[str],
    pictures: Callable[[int], Sequence[Image.Image]],
    count: int = 8,
) -> str:
    """The page as HTML that refers to nothing outside itself.

    Args:
        columns: Scores by column name; the first column is the model's.
        rows: Answers with their scores, as in samples.jsonl.
        figures: The plots as PNG by file name, `<task>_<what>.png`.
        about: What was scored, name and value.
        notes: What else to know, such as what was wrong with the input.
        pictures: The pictures of the row at a place.
        count: So many of the worst and of the best samples are shown of each task.
    """
    scores = next(iter(columns.values()))
    body = [f"<h1>{escape(str(about.get('model', 'Scores')))}</h1>"]
    told = " · ".join(f"{escape(name)} {escape(str(value))}" for name, value in about.items() if name != "model")
    body += [f'<p class="soft">{told}</p>', _table(columns)]
    if notes:
        body += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    for task in scores:
        body.append(f"<h2>{escape(task)}</h2>")
        for name, figure in figures.items():
            if name in {f"{task}_{what}.png" for what in ("spread", *KINDS)}:
                body.append(f'<img class="plot" alt="{escape(name)}" src="{_embedded(figure, "png")}">')
        places = [place for place, row in enumerate(rows) if row["task"] == task]
        worst, best = _extremes(rows, places, count)
        for title, chosen in (("Worst", worst), ("Best", best)):
            cards = "".join(_card(rows[place], pictures(place)) for place in chosen)
            body.append(f'<h3>{title} samples</h3><div class="cards">{cards}</div>')
    title = escape(str(about.get("model", "scores")))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>\n'
    )


def without_interval(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Notes on the scores of these names: programs that score a whole set give nothing to resample."""
    return [
        f"{task}: {name} {numbers[name]:.4f}, of the whole set by the official program, without an interval"
        for task, numbers in scores.items()
        for name in names
        if name in numbers
    ]


def dropped_visits(run: Mapping[str, Any]) -> list[str]:
    """Notes on what capacities dropped while the model answered: `run["dropped_visits"]`, shares 0..1 by layer."""
    shares = run.get("dropped_visits", {})
    return [f"{name} dropped {share:.1%} of its visits for want of capacity" for name, share in shares.items() if share]


def _table(columns: Mapping[str, Any]) -> str:
    (_, scores), *others = columns.items()
    header = ["task", "score", "value", "95 % interval", "n", *(COLUMNS.get(name, name) for name, _ in others)]
    lines = [header]
    for task, numbers in scores.items():
        for name, (low, high) in numbers["interval_95"].items():
            beside = [other.get(task, {}).get(name) for _, other in others]
            beside = ["–" if value is None else f"{value:.2f}" for value in beside]
            count = numbers.get("n_by_score", {}).get(name, numbers["n"])
            lines.append([task, name, f"{numbers[name]:.2f}", f"{low:.2f} .. {high:.2f}", f"{count:,}", *beside])
    rows = [
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for line, tag in zip(lines, ["th"] + ["td"] * len(lines), strict=False)
    ]
    scales = "Accuracies and F1 are percentages; CIDEr is 0..10 (papers print it times 100), BLEU and ROUGE-L are 0..1."
    ceilings = [numbers["CIDEr_ceiling"] for numbers in scores.values() if "CIDEr_ceiling" in numbers]
    scales += "".join(f" A copy of each picture's best reference would get CIDEr {high:.2f}." for high in ceilings)
    return f'<div class="scroll"><table>{"".join(rows)}</table></div><p class="soft">{scales}</p>'


def _extremes(rows: Sequence[Row], places: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Places of the worst and of the best samples, none in both; of many equals some from all over."""
    values = np.array([rows[place]["scores"][rows[place]["metric"]] for place in places])
    # Multiples of the golden ratio spread the equals evenly, however many of them are taken.
    order = [places[at] for at in np.lexsort((np.arange(len(values)) * 0.6180339887 % 1, values))]
    return order[: min(count, (len(order) + 1) // 2)], order[::-1][: min(count, len(order) // 2)]


def _card(row: Row, pictures: Sequence[Image.Image]) -> str:
    images = "".join(_picture(image) for image in pictures)
    metric = row["metric"]
    value = row["scores"][metric]
    colour = "" if metric == "CIDEr" else ' class="good"' if value >= 50 else ' class="bad"'
    truth = [f"{answer} ({votes})" for answer, votes in row["answers"]] or row["references"] or [row["target"]]
    lines = [
        f'<p class="soft">{escape(row["id"])} · {metric} {value:.2f}</p><p>{escape(row["question"])}</p>',
        f"<p{colour}><b>{escape(row['prediction']) or '<i>nothing</i>'}</b></p>",
        f'<p class="soft">{"<br>".join(escape(text) for text in truth[:3])}</p>',
    ]
    return f'<div class="card">{images}{"".join(lines)}</div>'


def _picture(image: Image.Image) -> str:
    small = max(image.size) <= 96
    image = image.convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    data = io.BytesIO()
    image.save(data, "PNG" if small else "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    name = ' class="small"' if small else ""
    return f'<img{name} alt="" src="{_embedded(data.getvalue(), kind)}">'


def _embedded(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def save_figures(figures: Mapping[str, bytes], folder: Path) -> None:
    """Write the plots into the folder, and drop those of an earlier report; a checkpoint's own plots stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("spread", *KINDS):
        for old in folder.glob(f"*_{name}.png"):
            old.unlink()
    for name, figure in figures.items():
        (folder / name).write_bytes(figure)


def draw_samples(samples: Sequence[Any], predictions: Sequence[str], path: str, *, count: int = 12) -> None:
    """Write a PNG page of samples, spread evenly over tasks and places: the question, the picture, the model's answer
    and the truth; green where they agree, red where not, blue for captions, which may be good in other words."""
    names = dict.fromkeys(sample.task for sample in samples)
    tasks = [[place for place, each in enumerate(samples) if each.task == name] for name in names]
    chosen: list[int] = []
    for shift, places in enumerate(tasks):
        stride = max(1, len(places) * len(tasks) // count)
        # Every task starts elsewhere, so that the page does not show the same pictures for each.
        chosen += places[shift * stride // len(tasks) :: stride][: count // len(tasks)]
    rows = max(1, -(-len(chosen) // 4))
    figure = Figure(figsize=(14, 4.6 * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for card, place in enumerate(chosen, start=1):
        sample, prediction = samples[place], predictions[place]
        mark, colour = ("✓ ", "#1b7f3b") if same_answer(prediction, sample.target) else ("✗ ", "#c0271d")
        mark, colour = ("", "#1f4e8c") if sample.metric == "CIDEr" else (mark, colour)
        axes = figure.add_subplot(rows, 4, card, xticks=[], yticks=[])
        axes.spines[:].set(color=colour, linewidth=3)
        if images := sample.images:
            height = max(image.height for image in images)
            padded = [ImageOps.pad(image, (image.width, height), color="white") for image in images]
            axes.imshow(np.concatenate([np.asarray(image) for image in padded], axis=1), interpolation="nearest")
        answer = _lines(f"{mark}model: {prediction}", 46) + "\n" + _lines(f"truth: {sample.target}", 46)
        axes.set_title(_lines(sample.question, 40), fontsize=10, parse_math=False)
        axes.set_xlabel(answer, fontsize=10, color=colour, loc="left", parse_math=False)
    figure.savefig(path, dpi=100, format="png")


def _lines(text: str, width: int) -> str:
    """The text in lines of this width, at most eight: a picture has room for no more."""
    return "\n".join(textwrap.wrap(text, width, max_lines=8, placeholder=" …"))
