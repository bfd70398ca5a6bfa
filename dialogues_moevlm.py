# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Dialogues about drawn scenes: later turns refer back to what was said."""

import random
from collections.abc import Iterator
from typing import NamedTuple

from .scenes_moevlm import SIZES, VALUES, Scene, Shape, balanced, matching, named_shapes, plural, references, sides_of

NEW_TOPIC = 0.15  # how often a dialogue leaves what it talks about, from its third turn on


class Turn(NamedTuple):
    """A turn of a dialogue; `refers_back`: the question cannot be understood without an earlier turn."""

    question: str
    answer: str
    refers_back: bool


class _Step(NamedTuple):
    """A possible next turn; what comes after it can refer to the shapes in focus."""

    key: str  # what to balance on
    turn: Turn
    focus: tuple[Shape, ...]
    known: frozenset[str]  # fields of the shapes in focus that were told


def dialogue(scene: Scene) -> tuple[Turn, ...]:
    """Give a dialogue of 3 to 5 turns; the second question, and most later ones, refer back to what was said."""
    rng = random.Random(f"{scene.name} dialogue")
    turns, asked, focus, known = [], set(), (), frozenset()
    while len(turns) < 3 or (len(turns) < 5 and rng.random() < 0.6):
        follow_ups = _about_it(scene, focus[0], known) if len(focus) == 1 else _about_them(focus, known)
        sources = [follow_ups, _openers(scene)]
        if len(turns) > 1 and rng.random() < NEW_TOPIC:
            sources.reverse()
        fresh = next(filter(None, ([step for step in source if step.turn.question not in asked] for source in sources)))
        _, turn, focus, known = balanced(fresh, rng)
        asked.add(turn.question)
        turns.append(turn._replace(question="and " * (turn.refers_back and rng.randint(0, 1)) + turn.question))
    return tuple(turns)


def _openers(scene: Scene) -> Iterator[_Step]:
    # Worded otherwise than the questions of scenes_moevlm, which want the bare answer: no text has two right answers.
    counted = [(scene.shapes, "shape", frozenset())]
    counted += [(matching(scene, **{field: value}), noun, frozenset({field})) for field, value, noun in VALUES]
    for found, noun, known in counted:
        if found:
            answer = f"there {'is' if len(found) == 1 else 'are'} {len(found)} {plural(noun, len(found))}"
            key = "all" if noun == "shape" else str(len(found))
            yield _Step(key, Turn(f"tell me how many {plural(noun, 2)} there are.", answer, False), found, known)
    for told, answer, words in (("kind", "color", "what color"), ("color", "kind", "what")):
        for shape, name in references(scene, told):
            turn = Turn(f"tell me {words} {name} is.", f"{name} is {_said(shape, answer)}", False)
            yield _Step(getattr(shape, answer), turn, (shape,), frozenset({told, answer}))


def _about_them(focus: tuple[Shape, ...], known: frozenset[str]) -> Iterator[_Step]:
    for field, value, _ in [*VALUES, *(("size", size, size) for size in SIZES)]:
        if focus and field not in known:
            found = tuple(shape for shape in focus if getattr(shape, field) == value)
            what = plural(value, 2) if field == "kind" else value
            answer = f"{len(found) or 'none'} of them are {what}"
            if len(found) == 1:
                answer = f"1 of them is {_said(found[0], field)}"
            turn = Turn(f"how many of them are {what}?", answer, True)
            yield _Step(str(len(found)), turn, found or focus, known | {field} if found else known)


def _about_it(scene: Scene, it: Shape, known: frozenset[str]) -> Iterator[_Step]:
    for field, question in (("color", "what color is it?"), ("kind", "what is it?"), ("size", "is it small or large?")):
        if field not in known:
            turn = Turn(question, f"it is {_said(it, field)}", True)
            yield _Step(getattr(it, field), turn, (it,), known | {field})
    for place, name in {None: "the middle", **named_shapes(scene, "color kind", "size color kind")}.items():
        for side, choice in sides_of(it, place):
            yield _Step(side, Turn(f"is it {choice} {name}?", f"it is {side} {name}", True), (it,), known)
    others = len(matching(scene, color=it.color)) - 1
    answer = f"{others or 'no'} other {plural('shape', others)} {'has' if others == 1 else 'have'} its color"
    yield _Step(str(others), Turn("how many other shapes have its color?", answer, True), (it,), known)


def _said(shape: Shape, field: str) -> str:
    return f"a {shape.kind}" if field == "kind" else getattr(shape, field)
