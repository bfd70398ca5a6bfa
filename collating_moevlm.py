# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Records to token sequences with a label mask, sequences to padded batches, and which of them come together.

Labels are -100 everywhere except at the assistant's tokens (the answer and the token that ends it). The independent
turns of a caption or VQA record are packed: their common prefix, which holds the picture, stands once in the sequence.
"""

import logging
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from torch.utils.data import Sampler
from transformers.utils.chat_template_utils import render_jinja_template

from .processing_moevlm import start_is_written, to_rgb

IGNORED = -100
INDEPENDENT_TASKS = ("caption", "vqa")
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

logger = logging.getLogger(__name__)


class _Tokens(NamedTuple):
    """One chat: token ids, labels, and the positions just past each answer."""

    ids: list[int]
    labels: list[int]
    ends: list[int]


def encode_record(record: dict, processor, max_length: int | None = None) -> dict[str, list[int]]:
    """The training sequence of a record; pictures are counted in its messages, never opened.

    The turns of a caption or VQA record see the picture and themselves only. Segment 0 is what all turns share, up to
    and including the last image token; segment t is the rest of turn t, at the positions it has alone. A token may
    attend an earlier one of segment 0 or of its own segment, so the packed loss equals that of the turns one by one.
    Chats and single turns are one segment 0.

    Args:
        record: `messages`, `task` and `id` of the record form.
        processor: A `MoeVlmProcessor`.
        max_length: Whole turns are dropped from the end until the sequence is no longer than this.

    Returns:
        `input_ids`, `labels`, `position_ids` and `segment_ids`, lists of one length.

    Raises:
        ValueError: There is no answer, not even the first turn fits `max_length`, a text holds the image token, or
            the turns do not share their pictures.
    """
    try:
        chats = _split_turns(record) if record["task"] in INDEPENDENT_TASKS else [record["messages"]]
        turns = [_expand_images(tokens, processor) for tokens in _tokenize(chats, processor)]
        if len(turns) == 1:
            return _one_segment(turns[0], max_length)
        return _packed(turns, processor.image_token_id, max_length)
    except ValueError as error:
        raise ValueError(f"record {record.get('id')!r}: {error}; or leave such out with skip_bad_rows") from error


def encode_or_skip(record: dict, processor, max_length: int | None = None) -> dict[str, list[int]]:
    """As [`encode_record`]; a record that it refuses gets empty lists, and a line in the log."""
    try:
        return encode_record(record, processor, max_length)
    except ValueError as error:
        logger.warning("left out record %r: %s", record.get("id"), error.__cause__)
        return {name: [] for name in ("input_ids", "labels", "position_ids", "segment_ids")}


def without_skipped(encoded: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The rows that [`encode_or_skip`] did encode; of a stored set the log says how many it did not.

    Raises:
        ValueError: It encoded none of a stored set.
    """
    kept = encoded.filter(bool, input_columns="input_ids")
    if not isinstance(kept, Dataset) or len(kept) == len(encoded):
        return kept
    if not len(kept):
        raise ValueError(f"none of {len(encoded)} records can be encoded; run without skip_bad_rows to see why")
    logger.warning("left out %d of %d records that cannot be encoded", len(encoded) - len(kept), len(encoded))
    return kept


class MoeVlmCollator:
    """Encoded records to one padded batch.

    Args:
        processor: A `MoeVlmProcessor` whose tokenizer has a padding token.
        pad_to_multiple_of: The length is rounded up to a multiple of this, so that few different shapes occur.
    """

    def __init__(self, processor, pad_to_multiple_of: int = 16):
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; set processor.tokenizer.pad_token to one of its tokens")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} is below 1; 1 pads to the longest row")
        self.processor = processor
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad on the right.

        Args:
            rows: `images` beside the columns of `encode_record`; pictures of a row with `shift` [x, y] are moved.

        Returns:
            `input_ids`, `attention_mask` (1 = real), `labels`, `position_ids`, `segment_ids`, each (rows, length), and
            `pixel_values` (pictures, 3, H, W), flat over the batch; left out when no row has a picture.

        Raises:
            ValueError: A row has fewer pictures than its text.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fillers = {
            "input_ids": self.processor.tokenizer.pad_token_id,
            "labels": IGNORED,
            "position_ids": 0,
            "segment_ids": 0,
        }
        batch = {
            name: torch.tensor([list(row[name]) + [filler] * (length - len(row[name])) for row in rows])
            for name, filler in fillers.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        pictures = [picture for row in rows for picture in self._pictures(row)]
        if pictures:
            batch["pixel_values"] = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return batch

    def _pictures(self, row: dict[str, Any]) -> list:
        """The row's pictures that its text still has; those of turns dropped by `max_length` are at the end."""
        tokens = sum(token == self.processor.image_token_id for token in row["input_ids"])
        wanted = tokens // self.processor.image_seq_length
        pictures = list(row.get("images") or [])
        if len(pictures) < wanted:
            raise ValueError(
                f"a row has {len(pictures)} images but its text has {wanted}; encode it again after changing its images"
            )
        return [
            shifted(picture, *row["shift"]) if any(row.get("shift") or ()) else picture for picture in pictures[:wanted]
        ]


def shifted(picture: Image.Image, right: int, down: int) -> Image.Image:
    """The picture (mode RGB) moved by so many pixels; its edge is repeated where it leaves room.

    Small movements are what a small tower needs to know a shape wherever it lies (docs/recipes.md, easy-VQA).
    """
    pixels = np.asarray(to_rgb(picture))  # (H, W, 3)
    height, width = pixels.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return Image.fromarray(pixels[rows[:, None], columns])


def _split_turns(record: dict) -> list[list[dict]]:
    """Each question and answer as a chat of its own, with the system message and the pictures of the first turn."""
    system, turns, current = [], [], []
    for message in record["messages"]:
        if message["role"] == "system":
            system.append(message)
            continue
        current.append(message)
        if message["role"] == "assistant":
            turns.append(current)
            current = []
    if len(turns) < 2:
        return [record["messages"]]
    first = _parts(turns[0][0])
    pictures = [part for part in first if part["type"] == "image"]
    if first[: len(pictures)] != pictures:
        raise ValueError(
            "text stands before a picture, so its turns cannot share the picture; "
            "put the pictures first or give each turn a record of its own"
        )
    if any(part["type"] == "image" for turn in turns[1:] for message in turn for part in _parts(message)):
        raise ValueError(
            f"a later turn of a {record['task']} record has a picture of its own; give that turn a record of its own"
        )
    later = [[{**question, "content": [*pictures, *_parts(question)]}, *rest] for question, *rest in turns[1:]]
    return [system + turn for turn in (turns[0], *later)]


def _parts(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _tokenize(chats: list[list[dict]], processor) -> list[_Tokens]:
    """Token ids and labels of the chats, each picture still one image token."""
    tokenizer = processor.tokenizer
    texts, spans = _render(chats, processor)
    controls = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    controls.discard(processor.image_token)  # counted below
    for chat, text in zip(chats, texts, strict=True):
        _check_chat(chat, text, processor.image_token, controls)
    encoded = tokenizer(
        texts,
        add_special_tokens=not start_is_written(tokenizer, texts),
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        _label(ids, offsets, answers)
        for ids, offsets, answers in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
    ]


def _check_chat(chat: list[dict], text: str, image_token: str, controls: set[str]) -> None:
    for control in controls:
        if any(control in (part.get("text") or "") for message in chat for part in _parts(message)):
            raise ValueError(f"a text holds {control}, which the tokenizer reads as a control token; take it out")
    if not any(message["role"] == "assistant" for message in chat):
        raise ValueError("there is no assistant message to learn from; add the answer")
    pictures = sum(part["type"] == "image" for message in chat for part in _parts(message))
    if text.count(image_token) != pictures:
        raise ValueError(
            f"the rendered chat has {text.count(image_token)} {image_token} placeholders for {pictures} images; "
            f"no text may hold {image_token} itself, and the chat template must write one for each image"
        )


def _render(chats: list[list[dict]], processor) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """The chats as text, and the character spans of the assistant's answers."""
    if GENERATION_TAG.search(processor.chat_template):
        return _templated(chats, processor, return_assistant_tokens_mask=True)
    texts, _ = _templated(chats, processor)
    return texts, [_answer_spans(chat, text, processor) for chat, text in zip(chats, texts, strict=True)]


def _templated(chats: list[list[dict]], processor, **options) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """What the chat template makes of the chats, and the spans of answers that it marks, if they are asked for."""
    tokens = processor.tokenizer.special_tokens_map
    return render_jinja_template(chats, chat_template=processor.chat_template, **options, **tokens)


def _answer_spans(chat: list[dict], text: str, processor) -> list[tuple[int, int]]:
    """Spans from rendered prefixes, for a template that does not mark them."""
    end_token, spans = processor.tokenizer.eos_token, []
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        (before,), _ = _templated([chat[:number]], processor, add_generation_prompt=True)
        (after,), _ = _templated([chat[: number + 1]], processor)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"the chat template renders message {number} differently when others follow, so its answer cannot be "
                "located; put {% generation %} and {% endgeneration %} around the answer in the template"
            )
        end = len(after)
        if end_token is not None and end_token in after[len(before) :]:
            # What a template writes past the end token is never generated.
            end = after.rindex(end_token) + len(end_token)
        spans.append((len(before), end))
    return spans


def _label(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> _Tokens:
    starts = [start for start, _ in offsets]
    stops = [stop for _, stop in offsets]
    labels, ends = [IGNORED] * len(ids), []
    for start, stop in spans:
        first, end = bisect_right(stops, start), bisect_left(starts, stop)
        labels[first:end] = ids[first:end]
        ends.append(end)
    return _Tokens(ids, labels, ends)


def _expand_images(tokens: _Tokens, processor) -> _Tokens:
    """Every image token repeated: the tokenizer splits at it, so this equals encoding the expanded text."""
    ids, labels, done = [], [], 0
    image_token_id, extra = processor.image_token_id, processor.image_seq_length - 1
    places = [index for index, token in enumerate(tokens.ids) if token == image_token_id]
    for place in places:
        ids += tokens.ids[done : place + 1] + [image_token_id] * extra
        labels += tokens.labels[done : place + 1] + [IGNORED] * extra
        done = place + 1
    ends = [end + extra * bisect_left(places, end) for end in tokens.ends]
    return _Tokens(ids + tokens.ids[done:], labels + tokens.labels[done:], ends)


def _one_segment(tokens: _Tokens, max_length: int | None) -> dict[str, list[int]]:
    length = len(tokens.ids)
    if max_length is not None and length > max_length:
        kept = [end for end in tokens.ends if end <= max_length]
        if not kept:
            raise _too_long(tokens.ends[0], max_length)
        length = kept[-1]
    return {
        "input_ids": tokens.ids[:length],
        "labels": tokens.labels[:length],
        "position_ids": list(range(length)),
        "segment_ids": [0] * length,
    }


def _packed(turns: list[_Tokens], image_token_id: int, max_length: int | None) -> dict[str, list[int]]:
    first = turns[0]
    prefix = len(first.ids) - first.ids[::-1].index(image_token_id) if image_token_id in first.ids else 0
    if any(turn.ids[:prefix] != first.ids[:prefix] for turn in turns):
        raise ValueError("the turns differ before the picture ends, so they cannot share it; split the record")
    row = {
        "input_ids": first.ids[:prefix],
        "labels": [IGNORED] * prefix,
        "position_ids": list(range(prefix)),
        "segment_ids": [0] * prefix,
    }
    for number, turn in enumerate(turns, start=1):
        length = len(turn.ids)
        if max_length is not None and len(row["input_ids"]) + length - prefix > max_length:
            if number == 1:
                raise _too_long(length, max_length)
            break
        row["input_ids"] += turn.ids[prefix:]
        row["labels"] += turn.labels[prefix:]
        row["position_ids"] += range(prefix, length)
        row["segment_ids"] += [number] * (length - prefix)
    return row


def _too_long(needed: int, max_length: int) -> ValueError:
    return ValueError(f"the first turn alone takes {needed} tokens but max_length={max_length}; raise it")


class StagedSampler(Sampler):
    """Row numbers in random order, batches of like lengths; in the first epoch lower stages come first.

    Like lengths save padding. Easy before hard, because a small model that starts with crowded pictures learns to guess
    before it learns to see (docs/recipes.md).

    Args:
        lengths: Tokens of each row.
        stages: Stage of each row.
        batch_size: Rows of one step over all ranks.
        seed: Of the order; the same on every rank.
    """

    WINDOW = 50  # batches sorted by length together

    def __init__(self, lengths: Sequence[int], stages: Sequence[int], *, batch_size: int, seed: int):
        self.lengths, self.stages = torch.tensor(lengths), torch.tensor(stages)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        if self.epoch == 0:
            order = order[self.stages[order].argsort(stable=True)]
        for window in order.split(self.WINDOW * self.batch_size):
            batches = window[self.lengths[window].argsort(stable=True)].split(self.batch_size)
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[index].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Trainer calls it before each."""
        self.epoch = epoch
