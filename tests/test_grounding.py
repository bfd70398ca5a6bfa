"""Grounding: image tokens are asked for the words of their answers, each word once, the end of an answer never."""

import math

import pytest
import torch

from moevlm.grounding_moevlm import image_words_loss

END = 7
EACH = torch.tensor([1, 1])  # one picture a row


def by_hand(logits, words):
    """Mean over pictures of the cross-entropy between a uniform distribution over `words` and the pooled scores."""
    losses = []
    for tokens, own in zip(logits.tolist(), words):
        scores = [math.log(sum(math.exp(token[word]) for token in tokens)) for word in range(len(tokens[0]))]
        total = math.log(sum(math.exp(score) for score in scores))
        losses.append(sum(total - scores[word] for word in own) / max(len(own), 1))
    return sum(losses) / len(losses)


def test_the_loss_is_the_definition():
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 4, 4, END, -100, 2, END], [-100, -100, 0, END, -100, -100, -100]])
    assert image_words_loss(logits, labels, EACH, END).item() == pytest.approx(by_hand(logits, [{2, 4}, {0}]), rel=1e-5)
    assert image_words_loss(logits, labels, EACH, None).item() == pytest.approx(
        by_hand(logits, [{2, 4, END}, {0, END}]), rel=1e-5
    )
    ends = [END, 4]  # Llama 3's instructed models have three
    assert image_words_loss(logits, labels, EACH, ends).item() == pytest.approx(by_hand(logits, [{2}, {0}]), rel=1e-5)


def test_each_picture_gets_the_words_of_its_own_row():
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, END], [5, -100, END], [-100, -100, END], [8, 8, END]])
    pictures = torch.tensor([2, 0, 1, 1])  # the second row has words and no picture, the third a picture and no words
    expected = by_hand(logits, [{1, 2}, {1, 2}, set(), {8}])
    assert image_words_loss(logits, labels, pictures, END).item() == pytest.approx(expected, rel=1e-5)


def test_one_token_that_shows_the_thing_is_enough():
    logits = torch.zeros(1, 16, 9)
    logits[0, 5, 3] = 30.0
    assert image_words_loss(logits, torch.tensor([[3, END]]), torch.tensor([1]), END).item() < 1e-3
