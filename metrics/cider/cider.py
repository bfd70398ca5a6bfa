"""CIDEr as captioning papers report it: CIDEr-D on coco-caption's scale of 0 to 10, without Java."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import datasets
import evaluate

from .ptb_tokenizer import tokenize

MAX_ORDER = 4
# Width of the length penalty (Vedantam et al. 2015, arXiv:1411.5726, section on CIDEr-D).
SIGMA = 6.0
# Below this many images the document frequencies say little: with one image every score is 0.
FEW_IMAGES = 24

_DESCRIPTION = """\
CIDEr-D: n-grams of 1 to 4 words weighted by how rare they are among the images of the test set, clipped, with a
penalty for a length that differs from the reference's. Equal to the score that coco-caption calls CIDEr.
"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title={CIDEr: Consensus-based Image Description Evaluation},
  author={Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={CVPR},
  year={2015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: One caption for each image.
    references: A list of captions for each image.
    per_item: Also return each image's own score.
    ceiling: Also return what the best of each image's own references would score in the prediction's place.
    document_frequencies: A table made by `document_frequencies(references)`, to score against the statistics of
        another, larger set; by default they come from `references`.
Returns:
    `CIDEr` in 0..10 (papers often print it times 100), the mean over images; `per_item` and `ceiling` if asked for.
Examples:
    >>> cider = evaluate.load(path)
    >>> cider.compute(predictions=["a dog runs"], references=[["a dog is running", "a brown dog runs"]])
"""


class NgramVector(NamedTuple):
    """A caption as tf-idf weights: one entry for each n-gram, one norm for each order, and its length in bigrams."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int


def count_ngrams(caption: str) -> Counter:
    """How often each n-gram of 1 to 4 words occurs in a caption, keyed by the tuple of its words."""
    words = tokenize(caption).split()
    counts = Counter()
    for order in range(1, MAX_ORDER + 1):
        counts.update(zip(*(words[start:] for start in range(order))))
    return counts


def count_images(references: Iterable[Sequence[Mapping]]) -> Counter:
    """In how many images' references each n-gram occurs."""
    frequencies = Counter()
    for counted in references:
        frequencies.update(set().union(*counted))
    return frequencies


class IdfTable:
    """The weight of an n-gram: the log of how many images there are for each image that has it."""

    def __init__(self, frequencies: Mapping[tuple[str, ...], int], images: int):
        self.unseen = math.log(images)
        self.weights = {ngram: self.unseen - math.log(max(1, count)) for ngram, count in frequencies.items()}

    def vector(self, counts: Mapping[tuple[str, ...], int]) -> NgramVector:
        weights, squares, bigrams = {}, [0.0] * MAX_ORDER, 0
        for ngram, count in counts.items():
            weight = count * self.weights.get(ngram, self.unseen)
            weights[ngram] = weight
            squares[len(ngram) - 1] += weight * weight
            if len(ngram) == 2:
                bigrams += count
        return NgramVector(weights, [math.sqrt(square) for square in squares], bigrams)


def similarity(candidate: NgramVector, reference: NgramVector) -> float:
    """Clipped cosine, averaged over the orders, times the length penalty: 0 to 1."""
    overlaps = [0.0] * MAX_ORDER
    for ngram, own in candidate.weights.items():
        if weight := reference.weights.get(ngram):
            overlaps[len(ngram) - 1] += min(own, weight) * weight
    cosine = 0.0
    for overlap, norm, other in zip(overlaps, candidate.norms, reference.norms):
        if norm and other:
            cosine += overlap / (norm * other)
    # coco-caption measures the length in bigrams, not in words.
    difference = candidate.bigrams - reference.bigrams
    return cosine / MAX_ORDER * math.exp(-(difference**2) / (2 * SIGMA**2))


def score(candidate: NgramVector, references: Sequence[NgramVector]) -> float:
    return 10.0 * sum(similarity(candidate, reference) for reference in references) / len(references)


def check_inputs(predictions: Sequence[str | None], references: Sequence[Sequence[str | None]]) -> None:
    if len(predictions) == 0:
        raise ValueError("predictions is empty; CIDEr needs at least one image, and a few dozen to mean anything")
    for index, (prediction, captions) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"predictions[{index}] is None; pass a string, an empty one if the model said nothing")
        if not captions or None in captions:
            raise ValueError(f"references[{index}]={captions}; every image needs at least one reference string")


def read_table(table: Mapping) -> tuple[dict[tuple[str, ...], int], int]:
    """Frequencies and number of images of a table made by `document_frequencies`."""
    if set(table) != {"images", "counts"} or table["images"] < 1:
        raise ValueError(
            'document_frequencies must be {"images": at least 1, "counts": {"a dog": 12, ...}}, '
            f"got keys {sorted(table)}; make it with document_frequencies(references)"
        )
    return {tuple(ngram.split(" ")): count for ngram, count in table["counts"].items()}, table["images"]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Cider(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1411.5726", "https://github.com/tylin/coco-caption"],
        )

    def document_frequencies(self, references: Sequence[Sequence[str]]) -> dict:
        """The statistics of a reference set as a table that json can store and `compute` takes.

        Args:
            references: A list of captions for each image.

        Returns:
            `{"images": number of images, "counts": {n-gram joined by spaces: images that have it}}`.
        """
        counted = [[count_ngrams(caption) for caption in captions] for captions in references]
        counts = {" ".join(ngram): count for ngram, count in count_images(counted).items()}
        return {"images": len(references), "counts": counts}

    def _compute(self, predictions, references, per_item=False, ceiling=False, document_frequencies=None):
        check_inputs(predictions, references)
        counted = [[count_ngrams(caption) for caption in captions] for captions in references]
        if document_frequencies is None:
            if len(predictions) < FEW_IMAGES:
                warnings.warn(
                    f"CIDEr over {len(predictions)} images: n-gram rarity comes from the references of the scored "
                    f"set, so scores of fewer than {FEW_IMAGES} images are not comparable (a single image always "
                    "scores 0); score more images at once or pass document_frequencies",
                    stacklevel=2,
                )
            idf = IdfTable(count_images(counted), len(predictions))
        else:
            idf = IdfTable(*read_table(document_frequencies))

        scores, ceilings = [], []
        for prediction, captions in zip(predictions, counted):
            vectors = [idf.vector(counts) for counts in captions]
            scores.append(score(idf.vector(count_ngrams(prediction)), vectors))
            if ceiling:
                ceilings.append(max(score(vector, vectors) for vector in vectors))
        result = {"CIDEr": sum(scores) / len(scores)}
        if per_item:
            result["per_item"] = scores
        if ceiling:
            result["ceiling"] = sum(ceilings) / len(ceilings)
        return result
