# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Image tokens that name what they show: a loss for the first steps of a training from scratch.

Without a pretrained tower the decoder must find out at once what the tower could see and how to ask for it, and learns
neither for long. Here the tower is asked directly, by the LM head, for the words of the picture's text.
"""

import torch
from torch import Tensor

from .collating_moevlm import IGNORED


def image_words_loss(logits: Tensor, labels: Tensor, pictures: Tensor, end: int | list[int] | None) -> Tensor:
    """Cross-entropy between the words of a picture's answers and what its image tokens say together, a scalar.

    The words of a caption are the labels of its picture, as in SuperClass (Huang et al. 2024, arXiv:2411.03313); the
    score of a word is the log-sum-exp over the image tokens, so that one token which shows the thing is enough.

    Args:
        logits: `(I, T, V)`, the LM head on the T image tokens of each picture.
        labels: `(rows, length)`, ids of the words to learn, -100 elsewhere.
        pictures: `(rows,)`, how many of the I pictures, in order, are each row's; the words of a row go to all of them.
        end: Id or ids of tokens that end an answer, which are no words; None if there is none.
    """
    ends = [end] if isinstance(end, int) else end or []
    words = (labels != IGNORED) & ~torch.isin(labels, labels.new_tensor(ends))
    present = logits.new_zeros(len(labels), logits.shape[-1], dtype=torch.float32)  # (rows, V)
    present.scatter_reduce_(1, labels.clamp(min=0), words.float(), "amax")
    target = present / present.sum(1, keepdim=True).clamp(min=1)
    said = logits.float().logsumexp(1).log_softmax(-1)  # (I, V)
    return -(target.repeat_interleave(pictures, 0) * said).sum(1).mean()
