# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""How long CIDEr takes on a test set of COCO's size: 5,000 images with 5 references each, on one core.

    python benchmarks/cider.py
    taskset -c 1 python benchmarks/cider.py --output benchmarks/cider.json

The captions are made up, with the lengths, the share of rare words and the marks of human ones. Where pycocoevalcap is
installed its scorer is timed too, on tokens that are already there; where Java is, its tokenizer as well.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import platform
import random
import shutil
import time
from pathlib import Path

import evaluate

ROOT = Path(__file__).resolve().parent.parent
IMAGES, REFERENCES, ROUNDS = 5000, 5, 3
MARKS = [", and", " -", "'s", " (left)", " 2", ' "stop"', "&", " t-shirt"]


def captions(count, draw):
    """Captions of about 10.5 words whose frequencies fall as those of human words do (Zipf's law)."""
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 8))) for _ in range(9000)]
    weights = [1 / (rank + 2.7) for rank in range(len(vocabulary))]
    for _ in range(count):
        words = draw.choices(vocabulary, weights, k=max(6, round(draw.gauss(10.5, 2.0))))
        if draw.random() < 0.15:
            words[draw.randrange(len(words))] += draw.choice(MARKS)
        yield " ".join(words).capitalize() + "."


def seconds(work):
    """The shortest of a few rounds: what the machine can do when nobody disturbs it; and all of them."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        rounds.append(round(time.perf_counter() - start, 3))
    return {"seconds": min(rounds), "rounds": rounds}


def official(predictions, references):
    """pycocoevalcap's scorer on tokens made by our tokenizer, and its tokenizer where Java is."""
    from pycocoevalcap.cider.cider import Cider

    spec = importlib.util.spec_from_file_location("ptb_tokenizer", ROOT / "metrics/cider/ptb_tokenizer.py")
    ptb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ptb)
    gts = {at: [ptb.tokenize(text) for text in texts] for at, texts in enumerate(references)}
    res = {at: [ptb.tokenize(text)] for at, text in enumerate(predictions)}
    found = {"pycocoevalcap_scorer_alone": seconds(lambda: Cider().compute_score(gts, res))}
    found["pycocoevalcap_CIDEr"] = float(Cider().compute_score(gts, res)[0])
    if shutil.which("java"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        rows = {at: [{"caption": text} for text in texts] for at, texts in enumerate(references)}
        with contextlib.redirect_stderr(io.StringIO()):
            found["pycocoevalcap_tokenizer_of_the_references"] = seconds(lambda: PTBTokenizer().tokenize(rows))
    return found


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the result.")
    output = parser.parse_args().output
    texts = list(captions(IMAGES * (REFERENCES + 1), random.Random(0)))
    predictions = texts[:IMAGES]
    references = [texts[IMAGES + REFERENCES * at :][:REFERENCES] for at in range(IMAGES)]
    # Some words of a prediction are its references', or nothing would match.
    predictions = [" ".join([*own[0].split()[:5], *said.split()[5:]]) for own, said in zip(references, predictions)]
    cider = evaluate.load(str(ROOT / "metrics" / "cider"))
    pairs = {"predictions": predictions, "references": references}
    words = sum(len(text.split()) for text in texts) / len(texts)
    result = {"images": IMAGES, "references": REFERENCES, "words_a_caption": round(words, 2)}
    result |= {"processor": processor(), "python": platform.python_version()}
    result["cider_with_tokenizing"] = seconds(lambda: cider.compute(**pairs))
    result["CIDEr"] = cider.compute(**pairs)["CIDEr"]
    if importlib.util.find_spec("pycocoevalcap"):
        result |= official(predictions, references)
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
