# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What the same captions score with other programs' tokenizers: a Markdown table.

    python benchmarks/caption_tokenizers.py

The captions are those of tests/fixtures/metrics/coco_caption.json, with the official scorers' results. Every other row
changes one thing and keeps our formulas. nltk, sacremoses and sacrebleu have rows where they are installed.
"""

import importlib.util
import json
import re
import sys
import warnings
from pathlib import Path

import evaluate

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("CIDEr", "BLEU-4", "ROUGE-L")


def tokenizers(ptb):
    """Name and function of each way to cut a caption into tokens joined by spaces."""
    yield "ours (pure Python)", ptb
    yield "split at spaces, lower-cased (no tokenizer)", lambda text: " ".join(text.lower().split())
    yield "words of letters and digits (\\w+), lower-cased", lambda text: " ".join(re.findall(r"\w+", text.lower()))
    yield "ours, capitals kept", lambda text: " ".join(_capitals(ptb, text))
    if importlib.util.find_spec("nltk"):
        from nltk.tokenize import TreebankWordTokenizer

        cut = TreebankWordTokenizer().tokenize
        yield "nltk Treebank, lower-cased, marks kept", lambda text: " ".join(cut(text.lower()))
        yield "nltk Treebank, lower-cased, marks dropped", lambda text: _without_marks(cut(text.lower()))
    if importlib.util.find_spec("sacremoses"):
        from sacremoses import MosesTokenizer

        moses = MosesTokenizer("en").tokenize
        yield "Moses, lower-cased, marks dropped", lambda text: _without_marks(moses(text.lower(), escape=False))


def _capitals(ptb, text):
    """Our tokens with the capitals that the caption had."""
    at = 0
    for token in ptb(text).split():
        found = text.lower().find(token, at)
        at = found + len(token) if found >= 0 else at
        yield text[found:at] if found >= 0 else token


def _without_marks(tokens):
    return " ".join(token for token in tokens if re.search(r"\w", token))


def score(metrics, pairs, tokenize):
    """The scores with another tokenizer in both metrics."""
    result = {}
    for metric in metrics:
        module = sys.modules[type(metric).__module__]
        before, module.tokenize = module.tokenize, tokenize
        try:
            result |= metric.compute(**pairs)
        finally:
            module.tokenize = before
    return result


def shards(metrics, pairs, count):
    """The mean over shards that are scored apart, as a program does that scores on each of its processes."""
    places = range(count)
    parts = [{name: column[shard::count] for name, column in pairs.items()} for shard in places]
    found = [{name: value for metric in metrics for name, value in metric.compute(**part).items()} for part in parts]
    return {name: sum(one[name] for one in found) / count for name in NAMES}


def main():
    warnings.simplefilter("ignore")
    golden = json.loads((ROOT / "tests/fixtures/metrics/coco_caption.json").read_text(encoding="utf-8"))
    pairs = {"predictions": golden["predictions"], "references": golden["references"]}
    metrics = [evaluate.load(str(ROOT / "metrics" / name)) for name in ("cider", "caption_overlap")]
    ptb = sys.modules[type(metrics[0]).__module__].tokenize
    official = {name: golden[name]["score"] for name in NAMES}
    lines = [("coco-caption (Java tokenizer, official scorers)", official)]
    lines += [(name, score(metrics, pairs, tokenize)) for name, tokenize in tokenizers(ptb)]
    lines.append(("ours, the mean of 4 processes' own scores", shards(metrics, pairs, 4)))
    if importlib.util.find_spec("sacrebleu"):
        import sacrebleu

        most = max(map(len, pairs["references"]))
        columns = [[own[at] if at < len(own) else None for own in pairs["references"]] for at in range(most)]
        bleu = sacrebleu.corpus_bleu(pairs["predictions"], columns, lowercase=True).score / 100
        lines.append(("sacreBLEU, lower-cased", {"BLEU-4": bleu}))
    print(
        f"| {len(pairs['predictions'])} images, the same captions | {' | '.join(NAMES)} | CIDEr against the official |"
    )
    print("|" + "---|" * (len(NAMES) + 2))
    for name, found in lines:
        cells = [f"{found[one]:.4f}" if one in found else "" for one in NAMES]
        off = f"{100 * (found['CIDEr'] / official['CIDEr'] - 1):+.1f} %" if "CIDEr" in found else ""
        print(f"| {name} | {' | '.join(cells)} | {off} |")


if __name__ == "__main__":
    main()
