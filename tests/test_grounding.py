"""Grounding: image tokens are asked for the words of their answers, each word once, the end of an answer never."""

import math

import pytest
import torch

from moevlm.grounding_moevlm import image_words_loss

END = 7


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
    assert image_words_loss(logits, labels, END).item() == pytest.approx(by_hand(logits, [{2, 4}, {0}]), rel=1e-5)
    assert image_words_loss(logits, labels, None).item() == pytest.approx(
        by_hand(logits, [{2, 4, END}, {0, END}]), rel=1e-5
    )


def test_all_pictures_of_a_row_get_its_words_and_a_row_without_words_costs_nothing():
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, END], [-100, -100, END]])
    expected = by_hand(logits, [{1, 2}, {1, 2}, set(), set()])
    assert image_words_loss(logits, labels, END).item() == pytest.approx(expected, rel=1e-5)


def test_one_token_that_shows_the_thing_is_enough():
    logits = torch.zeros(1, 16, 9)
    logits[0, 5, 3] = 30.0
    labels = torch.tensor([[3, END]])
    assert image_words_loss(logits, labels, END).item() < 1e-3


def test_pictures_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="3 pictures in 2 rows"):
        image_words_loss(torch.zeros(3, 4, 9), torch.zeros(2, 5, dtype=torch.long), END)
