"""BLEU-1 to BLEU-4 and ROUGE-L of captions, equal to coco-caption's, without Java; METEOR and SPICE only with it."""

import contextlib
import importlib
import importlib.util
import io
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import datasets
import evaluate

from .ptb_tokenizer import tokenize

MAX_ORDER = 4
# coco-caption's guards against a zero count and an empty caption.
TINY, SMALL = 1e-15, 1e-9
# ROUGE-L's preference for recall, as coco-caption sets it.
BETA = 1.2
# Programs that only exist in Java: pycocoevalcap's class that starts each.
JAVA_METRICS = {"METEOR": "pycocoevalcap.meteor.meteor.Meteor", "SPICE": "pycocoevalcap.spice.spice.Spice"}

_DESCRIPTION = """\
Overlap of a caption with its references: BLEU-1 to BLEU-4 over the whole set (clipped n-gram precision with a brevity
penalty) and ROUGE-L (longest common subsequence). Equal to coco-caption's scores.
"""

_CITATION = """\
@inproceedings{papineni2002bleu,
  title={BLEU: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={ACL},
  year={2002}
}
@inproceedings{lin2004rouge,
  title={ROUGE: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: One caption for each image.
    references: A list of captions for each image.
    per_item: Also return a dict for each image: its own scores, and the counts that BLEU of any subset is made of.
    java_metrics: "METEOR", "SPICE" or both: also run the official programs, which needs Java and pycocoevalcap.
Returns:
    `BLEU-1` .. `BLEU-4` and `ROUGE-L` in 0..1; `METEOR`, `SPICE` and `per_item` if asked for.
Examples:
    >>> overlap = evaluate.load(path)
    >>> overlap.compute(predictions=["a dog runs"], references=[["a dog is running", "a brown dog runs"]])
"""


class BleuCounts(NamedTuple):
    """What BLEU adds up: matched and possible n-grams for each order, and the two lengths in words."""

    matches: list[int]
    possible: list[int]
    length: int
    reference_length: int


def count_ngrams(words: Sequence[str]) -> Counter:
    """How often each n-gram of 1 to 4 words occurs, keyed by the tuple of its words."""
    counts = Counter()
    for order in range(1, MAX_ORDER + 1):
        counts.update(zip(*(words[start:] for start in range(order))))
    return counts


def bleu_counts(words: Sequence[str], references: Sequence[Sequence[str]]) -> BleuCounts:
    """The counts of one caption: each n-gram matches as often as the reference that has it most often."""
    most = Counter()
    for reference in references:
        most |= count_ngrams(reference)
    matches = [0] * MAX_ORDER
    for ngram, count in count_ngrams(words).items():
        matches[len(ngram) - 1] += min(count, most[ngram])
    possible = [max(0, len(words) - order) for order in range(MAX_ORDER)]
    # Of two equally close references the shorter one counts.
    _, closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)
    return BleuCounts(matches, possible, len(words), closest)


def bleu(counts: Sequence[BleuCounts]) -> list[float]:
    """BLEU-1 to BLEU-4 of the captions whose counts these are, taken together."""
    matches = [sum(column) for column in zip(*(item.matches for item in counts))]
    possible = [sum(column) for column in zip(*(item.possible for item in counts))]
    length = sum(item.length for item in counts)
    ratio = (length + TINY) / (sum(item.reference_length for item in counts) + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for order, (matched, total) in enumerate(zip(matches, possible), start=1):
        product *= (matched + TINY) / (total + SMALL)
        scores.append(product ** (1 / order) * brevity)
    return scores


def longest_common_subsequence(words: Sequence[str], others: Sequence[Sequence[str]]) -> list[int]:
    """Its length between `words` and each of `others`.

    One bit for each of `words` in an integer replaces a row of the usual table.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(words):
        positions[word] = positions.get(word, 0) | (1 << index)
    everything = (1 << len(words)) - 1
    lengths = []
    for other in others:
        row = everything
        for word in other:
            hits = row & positions.get(word, 0)
            row = ((row + hits) | (row - hits)) & everything
        lengths.append(len(words) - row.bit_count())
    return lengths


def rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F-score of the longest common subsequence; precision and recall may come from different references."""
    lengths = longest_common_subsequence(words, references)
    precision = max(lengths) / len(words)
    recall = max(length / len(reference) for length, reference in zip(lengths, references))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def check_inputs(predictions: Sequence[str | None], references: Sequence[Sequence[str | None]]) -> None:
    if len(predictions) == 0:
        raise ValueError("predictions is empty; BLEU and ROUGE-L need at least one image")
    for index, (prediction, captions) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"predictions[{index}] is None; pass a string, an empty one if the model said nothing")
        if not captions or None in captions:
            raise ValueError(f"references[{index}]={captions}; every image needs at least one reference string")


def named(bleu_scores: Sequence[float], rouge: float) -> dict[str, float]:
    scores = {f"BLEU-{order}": value for order, value in enumerate(bleu_scores, start=1)}
    return scores | {"ROUGE-L": rouge}


def check_java_metrics(names: Sequence[str]) -> None:
    """Raise before any work where a program is unknown or cannot run."""
    for name in names:
        if name not in JAVA_METRICS:
            raise ValueError(f'java_metrics: "{name}" is unknown; choose among {", ".join(JAVA_METRICS)}')
        lacks = [] if shutil.which("java") else ["Java on the PATH (Debian: apt-get install default-jre-headless)"]
        lacks += [] if importlib.util.find_spec("pycocoevalcap") else ["pip install pycocoevalcap==1.2"]
        if lacks:
            raise ImportError(
                f"java_metrics: {name} is a Java program, run by pycocoevalcap; it needs {' and '.join(lacks)}. "
                "CIDEr, BLEU and ROUGE-L need neither"
            )


def java_scores(name: str, lines: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """The official program's score of tokenized captions, of all and of each image."""
    module, _, kind = JAVA_METRICS[name].rpartition(".")
    # Not an import statement: `evaluate` would ask everyone for the package.
    make = getattr(importlib.import_module(module), kind)
    gts = {at: list(texts) for at, texts in enumerate(references)}
    res = {at: [text] for at, text in enumerate(lines)}
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            whole, items = make().compute_score(gts, res)
        except Exception as error:
            raise RuntimeError(
                f"java_metrics: {name} failed ({error!r}). SPICE downloads a parser at first use and runs on Java 8 "
                "to 15; METEOR needs 2 GB of memory"
            ) from error
    each = [item["All"]["f"] if isinstance(item, dict) else item for item in items]
    return float(whole), [float(item) for item in each]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CaptionOverlap(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://aclanthology.org/P02-1040", "https://github.com/tylin/coco-caption"],
        )

    check_java_metrics = staticmethod(check_java_metrics)  # for whoever has the loaded metric alone

    def _compute(self, predictions, references, per_item=False, java_metrics=()):
        check_inputs(predictions, references)
        check_java_metrics(java_metrics)
        lines = [tokenize(prediction) for prediction in predictions]
        others = [[tokenize(caption) for caption in captions] for captions in references]
        counts, rouges = [], []
        for line, texts in zip(lines, others):
            counts.append(bleu_counts(line.split(), [text.split() for text in texts]))
            # coco-caption splits at single spaces here, which makes an empty caption one empty word.
            rouges.append(rouge_l(line.split(" "), [text.split(" ") for text in texts]))
        result = named(bleu(counts), sum(rouges) / len(rouges))
        items = [named(bleu([item]), rouge) | item._asdict() for item, rouge in zip(counts, rouges)]
        for name in java_metrics:
            result[name], own = java_scores(name, lines, others)
            items = [item | {name: value} for item, value in zip(items, own)]
        return result | ({"per_item": items} if per_item else {})
