"""VQA accuracy by the rules of the official VQA evaluation: agreement with ten annotators."""

import re
import warnings
from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate

# Three annotators who agree make an answer fully right (Antol et al. 2015, arXiv:1505.00468).
ENOUGH = 3

_DESCRIPTION = """\
VQA accuracy: an answer is right to the degree that annotators gave it, min(1, matches / 3), averaged over all ways to
leave one annotator out. Follows the rules of the official VQA evaluation, its normalisation of answers included.
"""

_CITATION = """\
@inproceedings{antol2015vqa,
  title={VQA: Visual Question Answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
          Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={ICCV},
  year={2015}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: One answer for each question.
    references: The annotators' answers for each question, usually ten.
    question_types: A name for each question, for example "how many"; None leaves a question out of the breakdown.
    answer_types: A name for each question, for example "yes/no", "number", "other".
    normalize: "official" normalises answers only where the annotators disagree, as the official evaluation does;
        "always" does it everywhere, as many evaluation harnesses do.
Returns:
    Percentages, rounded to two digits as the official evaluation does: `vqa_accuracy`, `per_question` (a list),
    `per_question_type` and `per_answer_type` (dicts, empty where no types were given).
Examples:
    >>> vqa = evaluate.load(path)
    >>> vqa.compute(predictions=["two"], references=[["2"] * 9 + ["3"]])
"""

# Each is removed or replaced by a space, in this order.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
# The official script passes a flag where `re.sub` wants a count, and the flag's value is 32.
MAX_PERIODS = 32

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

# The contractions whose apostrophes are put back where an annotator left one out. The official list also has
# "Id've", "I'dve", "Im" and "Ive": words are lower-cased first, so they never apply.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def contraction_map(contractions: Sequence[str]) -> dict[str, str]:
    """Each contraction with one of its apostrophes missing, and how it should read."""
    restored = {}
    for word in contractions:
        for index, character in enumerate(word):
            if character == "'":
                restored[word[:index] + word[index + 1 :]] = word
    # An oddity of the official list: here the apostrophe goes.
    restored["somebody'd"] = "somebodyd"
    return restored


RESTORED = contraction_map(CONTRACTIONS)


def strip_punctuation(answer: str) -> str:
    joined = DIGIT_COMMA_DIGIT.search(answer) is not None
    stripped = answer
    for mark in PUNCTUATION:
        # Decided by the whole answer as it came, not mark by mark.
        touches_space = f"{mark} " in answer or f" {mark}" in answer
        stripped = stripped.replace(mark, "" if joined or touches_space else " ")
    return PERIOD.sub("", stripped, count=MAX_PERIODS)


def normalise(answer: str) -> str:
    """The answer without punctuation, capitals, articles and number words, and with its apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in strip_punctuation(answer).lower().split())
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)


def tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def accuracy(prediction: str, answers: Sequence[str], always_normalise: bool) -> float:
    """Mean over the annotators of min(1, matches among the others / 3): 0 to 1."""
    prediction, votes = tidy(prediction), Counter(tidy(answer) for answer in answers)
    if always_normalise or len(votes) > 1:
        prediction = normalise(prediction)
        votes = Counter(normalise(answer) for answer in votes.elements())
    agreeing, total = votes[prediction], votes.total()
    without_one_of_them = min(1.0, (agreeing - 1) / ENOUGH)
    without_another = min(1.0, agreeing / ENOUGH)
    return (agreeing * without_one_of_them + (total - agreeing) * without_another) / total


def percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 2)


def by_type(accuracies: Sequence[float], types: Sequence[str | None] | None, name: str) -> dict[str, float]:
    """Mean accuracy for each type, in the order of first appearance."""
    if types is None:
        return {}
    if len(types) != len(accuracies):
        raise ValueError(f"{name} has {len(types)} entries for {len(accuracies)} predictions; pass one for each")
    groups: dict[str, list[float]] = {}
    for value, kind in zip(accuracies, types):
        if kind is not None:
            groups.setdefault(kind, []).append(value)
    return {kind: percent(values) for kind, values in groups.items()}


def check_inputs(predictions: Sequence[str | None], references: Sequence[Sequence[str | None]]) -> None:
    if len(predictions) == 0:
        raise ValueError("predictions is empty; VQA accuracy needs at least one question")
    for index, (prediction, answers) in enumerate(zip(predictions, references)):
        if prediction is None:
            raise ValueError(f"predictions[{index}] is None; pass a string, an empty one if the model said nothing")
        if len(answers) < 2 or None in answers:
            raise ValueError(
                f"references[{index}]={answers}; leaving one annotator out needs at least 2 answers, usually 10; "
                "repeat a single ground truth ten times"
            )
    fewest = min(len(answers) for answers in references)
    if fewest <= ENOUGH:
        warnings.warn(
            f"a question has only {fewest} answers: with one annotator left out it can reach at most "
            f"{100 * (fewest - 1) / ENOUGH:.0f} %, the rules are made for 10",
            stacklevel=3,
        )


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VqaAccuracy(evaluate.Metric):
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
            reference_urls=["https://arxiv.org/abs/1505.00468", "https://visualqa.org/evaluation.html"],
        )

    def _compute(self, predictions, references, question_types=None, answer_types=None, normalize="official"):
        check_inputs(predictions, references)
        if normalize not in ("official", "always"):
            raise ValueError(f'normalize="{normalize}" is unknown; choose "official" or "always"')
        accuracies = [
            accuracy(prediction, answers, normalize == "always") for prediction, answers in zip(predictions, references)
        ]
        return {
            "vqa_accuracy": percent(accuracies),
            "per_question": [percent([value]) for value in accuracies],
            "per_question_type": by_type(accuracies, question_types, "question_types"),
            "per_answer_type": by_type(accuracies, answer_types, "answer_types"),
        }
