# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a run tells people: headline scores, a table, and pictures drawn from the Trainer's log history.

Letters: T logged steps, L sparse layers, E experts.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure

from .summary_moevlm import PARTS

History = Sequence[Mapping[str, Any]]
# Speed is a number of the machine, not of the model.
NO_SCORES = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
# The score of a task that counts for the best checkpoint, and what brings it to 0..100.
HEADLINES = {"caption": ("CIDEr", 10.0), "vqa": ("vqa_accuracy", 1.0), "chat": ("turn_accuracy", 1.0)}


def headlines(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """One score of each task, and `eval_score`, the mean of them on a scale of 0 to 100, for the best checkpoint."""
    numbers, scaled = {}, []
    for task, measured in scores.items():
        name, scale = HEADLINES[task]
        numbers[f"eval_{name}" if name.startswith(task) else f"eval_{task}_{name}"] = measured[name]
        scaled.append(measured[name] * scale)
    return {**numbers, "eval_score": float(np.mean(scaled))}


def run_numbers(state, speed: Mapping[str, float], model: torch.nn.Module) -> dict[str, Any]:
    """What the run was: steps, best score, seconds, sizes, versions, and the peak memory of this process in GiB."""
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "best_score": state.best_metric,
        "train_loss": speed["train_loss"],
        "train_seconds": speed["train_runtime"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A text table: a line for each score that has an interval, its value, the interval, and other columns' values.

    Args:
        results: Scores by column name; the first column is the model's and gives the lines and intervals.
    """
    (first, scores), *others = results.items()
    lines = [["task", "score", first, "95 % interval", "n", *(name for name, _ in others)]]
    for task, numbers in scores.items():
        for name, (low, high) in numbers["interval_95"].items():
            beside = [other.get(task, {}).get(name) for _, other in others]
            beside = ["-" if value is None else f"{value:.2f}" for value in beside]
            count = numbers.get("n_by_score", {}).get(name, numbers["n"])
            lines.append([task, name, f"{numbers[name]:.2f}", f"{low:.2f} .. {high:.2f}", str(count), *beside])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot_run(history: History, folder: str | Path) -> list[Path]:
    """Draw every picture that the history has numbers for; gives the files written into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "loss.png": draw_losses(history),
        "scores.png": draw_scores(history),
        "expert_load.png": draw_expert_load(history),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            written.append(folder / name)
    return written


def curve(history: History, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the entries that log `name`."""
    entries = [entry for entry in history if name in entry]
    return [entry["step"] for entry in entries], [entry[name] for entry in entries]


def draw_losses(history: History) -> Figure | None:
    """Training and evaluation loss, the routers' two losses, and the gradient norm of each part."""
    panels = {
        "loss": {"loss": "training", "eval_loss": "evaluation"},
        "router losses": {"aux_loss": "balance (1 = even)", "z_loss": "router z"},
        "gradient norms": {f"grad_norm_{part}": part for part in (*PARTS, "router")},
    }
    drawn = {
        title: {name: label for name, label in panel.items() if curve(history, name)[0]}
        for title, panel in panels.items()
    }
    drawn = {title: panel for title, panel in drawn.items() if panel}
    return _draw_panels(history, list(drawn.values()), list(drawn))


def draw_scores(history: History) -> Figure | None:
    """Every score of generated answers, a panel each: their scales differ."""
    names = sorted({name for entry in history for name in entry if name.startswith("eval_")} - set(NO_SCORES))
    titles = [name.removeprefix("eval_").replace("_", " ") for name in names]
    return _draw_panels(history, [{name: ""} for name in names], titles)


def _draw_panels(history: History, panels: Sequence[Mapping[str, str]], titles: Sequence[str]) -> Figure | None:
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, panel, title in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, titles, strict=True):
        for name, label in panel.items():
            steps, values = curve(history, name)
            axes.plot(steps, values, label=label, marker="o" if len(steps) < 30 else None, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if any(panel.values()):
            axes.legend()
    return figure


def draw_expert_load(history: History) -> Figure | None:
    """Heat map of the last logged load of each layer's experts, and how even each layer was over the run."""
    steps, tables = curve(history, "expert_load")
    if not tables:
        return None
    names, num_experts = list(tables[-1]), max(map(len, tables[-1].values()))
    load = np.full((len(names), num_experts), np.nan)  # (L, E), relative to an even share; no expert: no number
    for layer, shares in enumerate(tables[-1].values()):
        load[layer, : len(shares)] = np.array(shares) * len(shares)
    size = (7.2 + 0.55 * min(num_experts, 16), 1.6 + 0.5 * max(3, min(len(names), 24)))
    figure = Figure(figsize=size, layout="constrained")
    heat, lines = figure.subplots(1, 2, width_ratios=(1.2 + 0.25 * min(num_experts, 16), 2))
    image = heat.imshow(load, cmap="viridis", vmin=0, vmax=max(2.0, np.nanmax(load)), aspect="auto")
    heat.set(title=f"expert load at step {steps[-1]}", xlabel="expert")
    heat.set_yticks(range(len(names)), names)
    if num_experts <= 16:
        heat.set_xticks(range(num_experts))
        for layer, expert in np.argwhere(~np.isnan(load)):
            colour = "black" if load[layer, expert] > 0.7 * image.norm.vmax else "white"
            number = f"{load[layer, expert]:.1f}"
            heat.text(expert, layer, number, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=heat, label="load, 1 = even share")
    for name in names:
        logged = [(step, table[name]) for step, table in zip(steps, tables, strict=True) if name in table]
        lines.plot([step for step, _ in logged], [evenness(shares) for _, shares in logged], label=name)
    lines.set(title="evenness of the load", xlabel="step", ylabel="entropy / log E", ylim=(0, 1.05))
    lines.grid(alpha=0.3)
    lines.legend(fontsize=8)
    return figure


def evenness(shares: Sequence[float]) -> float:
    """Entropy of the shares over its largest possible value: 1 = all equal, 0 = one takes all."""
    positive = np.array([share for share in shares if share > 0])
    return float(-(positive * np.log(positive)).sum() / np.log(max(2, len(shares))))
