# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Two models on the same samples: how far apart they are, how sure that is, and where they differ."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Statistic = Callable[[np.ndarray], np.ndarray]


def compare(
    first: Sequence[Row],
    second: Sequence[Row],
    *,
    interval: Callable[[np.ndarray, Statistic], Sequence[float]],
    statistic_of: Callable[[str], Statistic],
    cider: Any,
) -> dict[str, Any]:
    """Second minus first, for each score of each task that both runs have, over the samples that both answered.

    Pairs are resampled, not answers: how hard a sample is cancels out, so the interval of the difference is narrower
    than the scores' own intervals suggest (Koehn 2004, "Statistical Significance Tests for Machine Translation").

    Args:
        first: Answers with their scores and rules, as `answers_moevlm.read_details` gives them; second likewise.
        interval: The bootstrap interval of a statistic of means, of one row for each sample.
        statistic_of: What makes the score of that name of the means of its samples' rows.
        cider: The loaded metric. Where one run has captions that the other lacks, the shared ones are scored anew: the
            document frequencies of each run's CIDEr come from all of its references.

    Returns:
        By task: `scores` with first, second, difference, interval_95, n and the numbers of samples on which the second
        wins, ties and loses; `changed`, the samples answered differently, the worst losses first; `unpaired`, the ids
        that only one run has.

    Raises:
        ValueError: The runs share no sample, the same id has another question or truth, or the rules differ.
    """
    runs = [{(row["task"], row["id"]): row for row in rows} for rows in (first, second)]
    shared = [key for key in runs[0] if key in runs[1]]
    if not shared:
        raise ValueError(f"the {len(first)} and {len(second)} answers share no sample; score both on the same data")
    names = ("question", "target", "references", "answers")
    if other := [key for key in shared if any(runs[0][key][name] != runs[1][key][name] for name in names)]:
        raise ValueError(
            f"{len(other)} samples have another question or truth in the second run, such as {' '.join(other[0])}; "
            "score both on the same data and task files"
        )
    result = {}
    for task in dict.fromkeys(task for task, _ in shared):
        pairs = [(runs[0][key], runs[1][key]) for key in shared if key[0] == task]
        unpaired = [
            [key[1] for key in run if key[0] == task and key not in theirs] for run, theirs in (runs, runs[::-1])
        ]
        if _rules(task, *pairs[0])["idf"] is None and any(unpaired) and "CIDEr" in pairs[0][0]["scores"]:
            pairs = _scored_anew(pairs, cider)
        names = [name for name in pairs[0][0]["scores"] if name != "CIDEr_references"]
        names += sorted({name for pair in pairs for name in pair[0]["scores"]} - {*names, "CIDEr_references"})
        scored = {
            name: _difference(name, pairs, interval, statistic_of(name))
            for name in names
            if any(name in a["scores"] and name in b["scores"] for a, b in pairs)
        }
        result[task] = {
            "scores": scored,
            "changed": _changed(pairs),
            "unpaired": dict(zip(("first", "second"), unpaired, strict=True)),
        }
    return result


def _rules(task: str, first: Row, second: Row) -> Mapping[str, Any]:
    """The rules that both runs of a task were scored by."""
    for name, value in first["rules"].items():
        if value != second["rules"][name]:
            raise ValueError(
                f"{task}: {name} is {value!r} in the first run and {second['rules'][name]!r} in the second; score both "
                f"with the same --{name} (run_eval.py --predictions scores answers anew)"
            )
    return first["rules"]


def _scored_anew(pairs: Sequence[tuple[Row, Row]], cider: Any) -> list[tuple[Row, Row]]:
    """The pairs with CIDEr by the document frequencies of just these samples."""
    references = [row["references"] or [row["target"]] for row, _ in pairs]
    sides = []
    for rows in zip(*pairs, strict=True):
        said = [row["prediction"] for row in rows]
        values = cider.compute(predictions=said, references=references, per_item=True)["per_item"]
        sides.append([{**row, "scores": row["scores"] | {"CIDEr": value}} for row, value in zip(rows, values)])
    return list(zip(*sides, strict=True))


def _difference(
    name: str, pairs: Sequence[tuple[Row, Row]], interval: Callable, statistic: Statistic
) -> dict[str, Any]:
    # A score such as that of turns that refer back is not every sample's.
    values = [
        [np.atleast_1d(np.asarray(row["scores"][name], dtype=float)) for row in pair]
        for pair in pairs
        if all(name in row["scores"] for row in pair)
    ]
    first, second = (np.stack([pair[side] for pair in values]) for side in (0, 1))  # (n, k) both
    width = first.shape[1]

    def gap(means: np.ndarray) -> np.ndarray:  # (R, 2k) -> (R,)
        return statistic(means[:, width:]) - statistic(means[:, :width])

    whole = [float(statistic(side.mean(0, keepdims=True))[0]) for side in (first, second)]
    each = np.round(gap(np.concatenate([first, second], axis=1)), 9)  # rounded: a tie is not a matter of the last bit
    return {
        "first": whole[0],
        "second": whole[1],
        "difference": whole[1] - whole[0],
        "interval_95": list(interval(np.concatenate([first, second], axis=1), gap)),
        "n": len(values),
        "wins": int((each > 0).sum()),
        "ties": int((each == 0).sum()),
        "losses": int((each < 0).sum()),
    }


def _changed(pairs: Sequence[tuple[Row, Row]]) -> list[dict[str, Any]]:
    changed = []
    for first, second in pairs:
        if first["prediction"] != second["prediction"]:
            gain = second["scores"][second["metric"]] - first["scores"][first["metric"]]
            told = {name: first[name] for name in ("id", "question", "target")}
            changed.append(told | {"first": first["prediction"], "second": second["prediction"], "gain": gain})
    return sorted(changed, key=lambda row: row["gain"])


def as_text(comparison: Mapping[str, Any], names: Sequence[str], *, shown: int) -> str:
    """A table of the differences, and of each task the `shown` worst losses and best wins."""
    header = ["task", "score", names[0], names[1], "difference", "95 % interval", "win/tie/loss", "n", "sure"]
    lines = [header]
    for task, found in comparison.items():
        for name, one in found["scores"].items():
            low, high = one["interval_95"]
            digits = 2 if max(abs(one["first"]), abs(one["second"])) > 1 else 4
            numbers = [f"{one['first']:.{digits}f}", f"{one['second']:.{digits}f}", f"{one['difference']:+.{digits}f}"]
            counts = [f"{one['wins']}/{one['ties']}/{one['losses']}", str(one["n"])]
            sure = "yes" if round(low, 9) > 0 or round(high, 9) < 0 else "no"  # as ties are told from wins
            lines.append([task, name, *numbers, f"{low:+.{digits}f} .. {high:+.{digits}f}", *counts, sure])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for task, found in comparison.items():
        text += _examples(task, found, names, shown)
    return "\n".join(text)


def _examples(task: str, found: Mapping[str, Any], names: Sequence[str], shown: int) -> list[str]:
    changed = found["changed"]
    losses = [row for row in changed if row["gain"] < 0][:shown]
    wins = [row for row in changed[::-1] if row["gain"] > 0][:shown]
    text = [f"\n{task}: {len(changed)} answers changed"]
    for side, ids in found["unpaired"].items():
        if ids:
            text.append(f"  {len(ids)} samples only in the {side} run are left out: {', '.join(ids[:5])}")
    for title, rows in (("lost", losses), ("won", wins)):
        for row in rows:
            text.append(f"  {title} {row['gain']:+.2f}  {row['id']}  {row['question']}  (truth: {row['target']})")
            text += [f"      {name}: {row[side]}" for name, side in zip(names, ("first", "second"), strict=True)]
    return text
