# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What a score is compared with: other image-text-to-text models, the same model without pictures, no model at all."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(name: str | None, dtype: str, device: Any) -> tuple[Any, Any]:
    """Any image-text-to-text model of transformers, ours or another's, and its processor, on the device.

    Raises:
        ValueError: No name, a model that does not turn images and text into text, or no processor.
        OSError: Nothing is there.
    """
    if name is None:
        raise ValueError("model_name_or_path is missing: name a checkpoint, or a file of answers with --predictions")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f"model_name_or_path={name}: no folder with a config.json under {Path.cwd()}, and the Hub gave none; "
            f"check the path ({str(error).splitlines()[0]})"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"model_name_or_path={name} holds a {config.model_type!r} model, which does not turn images and text "
            f"into text; give a MoeVlm or another image-text-to-text checkpoint"
        )
    processor = transformers.AutoProcessor.from_pretrained(name)
    if not isinstance(processor, transformers.ProcessorMixin):
        raise ValueError(f"model_name_or_path={name} holds no processor; save the model's processor beside it")
    return transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device), processor


def without_pictures(sample: Any) -> Any:
    """The same words with no picture anywhere: what a language model alone would be asked."""
    prompt = [
        {**message, "content": [part for part in message["content"] if part["type"] != "image"]}
        for message in sample.prompt
    ]
    return sample._replace(prompt=prompt, read_images=list)


def commonest_answers(train: Iterable[Any], samples: Sequence[Any]) -> list[str]:
    """What somebody says who never looks: the commonest train answer to the same words.

    For words not seen in training it is the commonest answer to the question's type, then to the task.
    """

    def keys(sample: Any) -> list[tuple]:
        return [(sample.task, "words", sample.question), (sample.task, "type", sample.question_type), (sample.task,)]

    tallies: dict[tuple, Counter] = defaultdict(Counter)
    for sample in train:
        for key in keys(sample):
            tallies[key][sample.target] += 1
    commonest = {key: tally.most_common(1)[0][0] for key, tally in tallies.items()}
    return [next((commonest[key] for key in keys(sample) if key in commonest), "") for sample in samples]
