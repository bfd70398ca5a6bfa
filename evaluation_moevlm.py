# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a finished model says about pictures, how good that is, and how sure we are of it."""

import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from PIL import Image
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from .processing_moevlm import start_is_written, to_rgb

logger = logging.get_logger(__name__)
# Limits, not lengths: generation stops at the end token. COCO captions rarely pass 40 tokens, VQA answers 5.
MAX_NEW_TOKENS = {"caption": 64, "vqa": 16, "chat": 64}
TASKS = tuple(MAX_NEW_TOKENS)
# What a record's task is scored with; each metric's name is that of its first score.
METRICS = {"caption": "CIDEr", "vqa": "vqa_accuracy", "chat": "turn_accuracy"}


class Sample(NamedTuple):
    """One thing to answer: the messages so far, their pictures, and what people answered; how it is scored."""

    id: str
    task: str
    metric: str
    read_images: Callable[[], Sequence[Image.Image]]
    prompt: list[dict[str, Any]]
    target: str
    references: Sequence[str] = ()
    answers: Sequence[str] = ()
    question_type: str | None = None
    answer_type: str | None = None
    turn: int | None = None
    refers_back: bool = False
    version: str = ""  # of the stored data that it was read from: changes with the data's words and pictures

    @property
    def num_images(self) -> int:
        return sum(part["type"] == "image" for message in self.prompt for part in message["content"])

    @property
    def images(self) -> list[Image.Image]:
        """The prompt's pictures as RGB, read anew at each look: a test part need not fit in memory."""
        return [to_rgb(image) for image in list(self.read_images() or [])[: self.num_images]]

    @property
    def question(self) -> str:
        """The text of the last user turn."""
        return " ".join(part["text"] for part in self.prompt[-1]["content"] if part["type"] == "text")


def samples_from(dataset: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Everything in an ungrouped data set that can be scored, in its order.

    Captions and questions give one sample each. A dialogue gives one per assistant turn, each with the true history
    before it, so that one wrong turn is not counted again in the turns after it.

    Raises:
        ValueError: An unknown task, a record without an answer, or a caption/vqa record with several.
    """
    samples: list[Sample] = []
    lazy = isinstance(dataset, Dataset)
    for row, record in enumerate(dataset.remove_columns("images") if lazy else dataset):
        read = (lambda row=row: dataset[row]["images"]) if lazy else (lambda record=record: record["images"])
        samples += _record_samples(record, read)
    return [one._replace(version=dataset._fingerprint) for one in samples] if lazy else samples


def _record_samples(record: Mapping[str, Any], read_images: Callable[[], list[Image.Image]]) -> Iterator[Sample]:
    task, name = record["task"], record["id"]
    if task not in TASKS:
        raise ValueError(f"record {name!r} has task={task!r}; use one of {', '.join(TASKS)}")
    # Arrow fills absent fields with None, which chat templates stumble over.
    messages = [
        {**message, "content": [{key: value for key, value in part.items() if value is not None} for part in parts]}
        for message, parts in ((message, message["content"]) for message in record["messages"])
    ]
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or (task != "chat" and len(turns) > 1):
        raise ValueError(
            f"record {name!r} of task {task!r} holds {len(turns)} assistant turns; scoring needs "
            f"{'at least one' if task == 'chat' else 'exactly one: load the data with grouped=False'}"
        )
    refers_back = record.get("refers_back") or [False] * len(turns)
    for turn, place in enumerate(turns):
        yield Sample(
            id=f"{name}#{turn}" if task == "chat" else str(name),
            task=task,
            metric=METRICS[task],
            read_images=read_images,
            prompt=messages[:place],
            target="".join(part["text"] for part in messages[place]["content"]),
            references=record.get("references") or (),
            answers=record.get("answers") or (),
            question_type=record.get("question_type"),
            answer_type=record.get("answer_type"),
            turn=turn + 1 if task == "chat" else None,
            refers_back=bool(refers_back[turn]),
        )


def _generator(seed: int, name: str) -> np.random.Generator:
    # Seeded by name, not by place: the same on every rank and in every selection of samples.
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _noise(sample: Sample, seed: int) -> list[Image.Image]:
    """Noise in place of the sample's pictures, of the same sizes: what is left is what the words give away."""
    draws = _generator(seed, sample.id)
    sizes = [(image.height, image.width, 3) for image in sample.images]
    return [Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def predict(
    model,
    processor,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    max_new_tokens: int | Mapping[str, int] | None = None,
    blind: bool = False,
    seed: int = 0,
    known: Mapping[int, str] | None = None,
    keep: Callable[[Sequence[int], Sequence[str]], None] = lambda places, answers: None,
) -> list[str]:
    """The model's greedy answers, in the order of the samples, on every rank.

    Batches of similar samples go to the ranks of `torch.distributed` in turn: each sample is answered exactly once,
    in the same company, whatever the number of ranks. Every rank needs the whole model (unwrap DDP before).

    Args:
        batch_size: Samples at a time on each rank.
        max_new_tokens: A limit for all tasks or one by task; `MAX_NEW_TOKENS` where there is none.
        blind: Answer about noise of the same size, drawn from `seed`, instead of the pictures.
        known: Answers of an earlier run by the sample's place, the same on every rank; only whole batches of them are
            taken over, so that the others are answered in the company they would have had.
        keep: Called on each rank with the places and answers of each of its batches, as soon as there are any.
    """
    tasks = {sample.task for sample in samples}
    given = dict.fromkeys(tasks, max_new_tokens) if isinstance(max_new_tokens, int) else max_new_tokens or {}
    known, limits = known or {}, {**MAX_NEW_TOKENS, **given}
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    render = partial(processor.apply_chat_template, tokenize=False, add_generation_prompt=True)
    texts = [render(sample.prompt) for sample in samples]
    batches = _batches(processor.tokenizer, texts, samples, batch_size)
    whole = [batch for batch in batches if all(place in known for place in batch)]
    answers = {place: known[place] for batch in whole for place in batch}
    batches = [batch for batch in batches if batch[0] not in answers][rank::ranks]
    with (
        torch.inference_mode(),
        _answering(model, processor.tokenizer),
        tqdm(total=sum(map(len, batches)), desc="answering", unit="answer", disable=rank != 0) as progress,
    ):
        for batch in batches:
            images = [_noise(samples[place], seed) if blind else samples[place].images for place in batch]
            limit = limits[samples[batch[0]].task]
            new = _answer(model, processor, [texts[place] for place in batch], images, max_new_tokens=limit)
            answers.update(zip(batch, new, strict=True))
            keep(batch, new)
            progress.update(len(batch))
    if ranks > 1:
        shards: list[dict[int, str]] = [{}] * ranks
        dist.all_gather_object(shards, answers)
        answers = {place: answer for shard in shards for place, answer in shard.items()}
    return [answers[place] for place in range(len(samples))]


def _batches(tokenizer, texts: Sequence[str], samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Places of samples, each batch of one task and one number of pictures, the longest (most likely too big) first."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        groups[sample.task, sample.num_images].append(place)
    lengths = [len(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []
    batches = []
    for key in sorted(groups, reverse=True):
        places = sorted(groups[key], key=lambda place: -lengths[place])
        batches += [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return batches


def _answer(
    model, processor, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], *, max_new_tokens: int
) -> list[str]:
    tokenizer = processor.tokenizer
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not start_is_written(tokenizer, texts)}
    inputs = processor(text=texts, images=images if any(images) else None, **options)
    dtypes = {name: model.dtype if value.is_floating_point() else None for name, value in inputs.items()}
    inputs = {name: value.to(model.device, dtypes[name]) for name, value in inputs.items()}
    prompt_length = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and prompt_length + max_new_tokens > positions:
        logger.warning_once(
            f"a prompt and its answer of {max_new_tokens} tokens pass the model's {positions} positions, beyond which "
            "it says little; give fewer worked examples or shorter prompts"
        )
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, use_cache=True)
    texts = processor.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


@contextmanager
def _answering(model, tokenizer) -> Iterator[None]:
    """Evaluation mode, left padding, greedy decoding; afterwards each part as it was (frozen parts may rest in
    evaluation mode)."""
    modes, side = [(module, module.training) for module in model.modules()], tokenizer.padding_side
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's generate asks that one
    brought = base.generation_config
    # Sampling, penalties, least lengths: whatever a checkpoint brings, the scores are those of its likeliest words.
    ids = {name: value for name, value in brought.to_dict().items() if name.endswith("token_id") and value is not None}
    ids = {"eos_token_id": tokenizer.eos_token_id} | ids
    ids["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.eval()
    base.generation_config, tokenizer.padding_side = GenerationConfig(**ids), "left"
    try:
        yield
    finally:
        base.generation_config, tokenizer.padding_side = brought, side
        for module, training in modes:
            module.training = training


class Rules(NamedTuple):
    """Choices among published ways to score; the defaults are the official ones."""

    document_frequencies: Mapping[str, Any] | None = None  # CIDEr's table; None: made from the scored references
    java_metrics: Sequence[str] = ()  # METEOR, SPICE
    normalize: str = "official"  # VQA answers: "official", or "always" as other harnesses do


def score(
    samples: Sequence[Sample], predictions: Sequence[str], metrics: Mapping[str, Any], *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Scores by task, for the tasks that occur; `interval_95` holds the bootstrap interval of each score.

    Args:
        metrics: The loaded metric modules "cider", "caption_overlap" and "vqa_accuracy"; the seed is the bootstrap's.

    Returns:
        By metric, each with n, the number of samples, and n_by_score: not every sample has every score.
        CIDEr: CIDEr, what people's captions score against the others (CIDEr_references), and what a copy of each
            picture's best one would (CIDEr_ceiling), 0..10; BLEU-1..4 and ROUGE-L, 0..1; idf, the digest of the table
            of document frequencies, or None where they come from the scored references.
        vqa_accuracy: vqa_accuracy, exact_match, per_answer_type, per_question_type (percent), normalize (the rule).
        turn_accuracy: turn_accuracy, refers_back_accuracy, token_f1 (percent).
    """
    return score_each(samples, predictions, metrics, seed=seed, rules=Rules())[0]


def score_each(
    samples, predictions, metrics, *, seed: int, rules: Rules
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What `score` gives, and the scores of each sample; in the place of its BLEU-4 stand the counts to add up."""
    scorers = {"CIDEr": _score_captions, "vqa_accuracy": _score_vqa, "turn_accuracy": _score_dialogues}
    pairs = list(zip(samples, predictions, strict=True))
    tasks = {sample.task: sample.metric for sample in samples}
    scores: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = [{} for _ in pairs]
    for task, metric in sorted(tasks.items(), key=lambda task: list(scorers).index(task[1])):
        places = [place for place, (sample, _) in enumerate(pairs) if sample.task == task]
        chosen = [samples[place] for place in places]
        values, items = scorers[metric](chosen, [predictions[place] for place in places], metrics, rules)
        for name, column in items.items():
            for place, value in zip(places, column, strict=True):
                rows[place] |= {} if value is None else {name: value}
        given = {name: [value for value in column if value is not None] for name, column in items.items()}
        intervals = {name: bootstrap_interval(each, statistic_of(name), seed=seed) for name, each in given.items()}
        counts = {"n": len(places), "n_by_score": {name: len(each) for name, each in given.items()}}
        scores[task] = {**values, **counts, "interval_95": intervals}
    return scores, rows


def _score_captions(samples, predictions, metrics, rules):
    references = [sample.references or [sample.target] for sample in samples]
    pairs = {"predictions": predictions, "references": references, "per_item": True}
    table = rules.document_frequencies
    cider = metrics["cider"].compute(**pairs, ceiling=True, document_frequencies=table)
    overlap = metrics["caption_overlap"].compute(**pairs, java_metrics=rules.java_metrics)
    counts = overlap.pop("per_item")
    items = {"CIDEr": cider["per_item"]}
    items["ROUGE-L"] = [each["ROUGE-L"] for each in counts]
    items["BLEU-4"] = [
        (*each["matches"], *each["possible"], each["length"], each["reference_length"]) for each in counts
    ]
    digest = None if table is None else f"{zlib.crc32(json.dumps(table, sort_keys=True).encode()):08x}"
    values = {"CIDEr": cider["CIDEr"], "CIDEr_ceiling": cider["ceiling"], "idf": digest, **overlap}
    if agreement := reference_agreement(references, metrics["cider"], table):
        values["CIDEr_references"], remaining = (float(np.mean(agreement)), iter(agreement))
        items["CIDEr_references"] = [next(remaining) if len(each) > 1 else None for each in references]
    return values, items


def statistic_of(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What makes a score of the means of its samples' rows: BLEU-4 is no mean of the samples' own."""
    return _bleu_4 if name == "BLEU-4" else np.ravel


def _bleu_4(counts: np.ndarray) -> np.ndarray:
    """BLEU-4 `(R,)` of mean counts `(R, 10)`: matched and possible n-grams of 1..4 words, own and reference length."""
    # The same guards against zero counts as in the metric.
    precision = np.exp(np.log((counts[:, :4] + 1e-15) / (counts[:, 4:8] + 1e-9)).mean(1))
    return precision * np.exp(np.minimum(0.0, 1.0 - (counts[:, 9] + 1e-9) / (counts[:, 8] + 1e-15)))


def reference_agreement(references: Sequence[Sequence[str]], cider, table=None) -> list[float]:
    """CIDEr of people's captions, each against the others of its picture: one mean for every picture that has two.

    In round r every picture leaves out its r-th reference, which is scored against the rest; the document
    frequencies come from the table or from the rest, as for a model. The result is the mean over rounds.
    """
    several = [list(each) for each in references if len(each) > 1]
    rounds = []
    for left_out in range(max(map(len, several), default=0)):
        guesses = [each[left_out % len(each)] for each in several]
        rest = [each[: left_out % len(each)] + each[left_out % len(each) + 1 :] for each in several]
        scored = cider.compute(predictions=guesses, references=rest, per_item=True, document_frequencies=table)
        rounds.append(scored["per_item"])
    return np.mean(rounds, axis=0).tolist() if rounds else []


def _score_vqa(samples, predictions, metrics, rules):
    # The official rule compares ten annotators; one person's answer stands for ten who agree.
    answers = [sample.answers if len(sample.answers) > 1 else [sample.target] * 10 for sample in samples]
    types = {f"{kind}s": [getattr(one, kind) for one in samples] for kind in ("question_type", "answer_type")}
    pairs = {"predictions": predictions, "references": answers, "normalize": rules.normalize}
    result = metrics["vqa_accuracy"].compute(**pairs, **types)
    per_question = result.pop("per_question")
    exact = [100.0 * same_answer(guess, sample.target) for sample, guess in zip(samples, predictions, strict=True)]
    values = {**result, "exact_match": float(np.mean(exact)), "normalize": rules.normalize}
    return values, {"vqa_accuracy": per_question, "exact_match": exact}


def _score_dialogues(samples, predictions, metrics, rules):
    right = [100.0 * same_answer(guess, one.target) for one, guess in zip(samples, predictions, strict=True)]
    back = [value if one.refers_back else None for one, value in zip(samples, right, strict=True)]
    f1 = [100.0 * token_f1(guess, one.target) for one, guess in zip(samples, predictions, strict=True)]
    items = {"turn_accuracy": right, "refers_back_accuracy": back, "token_f1": f1}
    items = {name: column for name, column in items.items() if any(value is not None for value in column)}
    return {name: float(np.mean([v for v in column if v is not None])) for name, column in items.items()}, items


def same_answer(prediction: str, target: str) -> bool:
    """Whether the whole answers agree, apart from case and outer spaces."""
    return prediction.strip().lower() == target.strip().lower()


def token_f1(prediction: str, target: str) -> float:
    """Overlap of words, 0..1: the harmonic mean of precision and recall (Rajpurkar et al. 2016, SQuAD)."""
    guessed, true = (Counter(re.findall(r"\w+", text.lower())) for text in (prediction, target))
    if not guessed or not true:
        return float(guessed == true)
    return 2.0 * (guessed & true).total() / (guessed.total() + true.total())


def bootstrap_interval(
    values: Sequence, statistic: Callable[[np.ndarray], np.ndarray] = np.ravel, *, seed: int = 0, resamples: int = 1000
) -> list[float]:
    """The 95 % percentile interval of a mean over samples drawn with replacement, or of a `statistic` of means.

    Args:
        values: One number or one row for each of n samples, `(n,)` or `(n, k)`.
        statistic: Turns the means `(R, k)` of R resamples into estimates `(R,)`.
    """
    values = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    rows, counts = np.unique(values, axis=0, return_counts=True)
    draws = np.random.default_rng(seed)
    # Counts of the distinct rows instead of n draws: the same distribution, and accuracies have few of them.
    sums = [draws.multinomial(len(values), counts / len(values), size=100) @ rows for _ in range(resamples // 100)]
    return np.percentile(statistic(np.concatenate(sums) / len(values)), [2.5, 97.5]).tolist()
