# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Scenes: small pictures of coloured shapes with captions, questions and dialogues, drawn from a seed and no file.

A scene is 1 to 5 shapes on a light background of 64x64 pixels. Every shape's centre lies in its own cell of a 4x4 grid,
so that columns and rows are plain to see. What a scene shows decides its split: `train`, `eval` and `test` share none.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, count, islice, permutations, product
from typing import NamedTuple

from PIL import Image, ImageDraw

SPLITS = ("train", "eval", "test")
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 60), "blue": (40, 90, 220),
    "yellow": (245, 200, 20), "purple": (150, 50, 190), "black": (35, 35, 35),
}  # fmt: skip
KINDS = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 10.0, "large": 16.0}  # pixels across

SIDE, GRID = 64, 4
CELL = SIDE // GRID
MAX_SHAPES = 5
JITTER = 2.5  # a centre's distance from its cell's centre; two columns then differ by at least 16 - 5 = 11 pixels
GAP = 1.0  # least distance between two shapes
MARGIN = 10.0  # "left of" and "above" are asked only of centres at least this far apart
PLACEMENTS = 40  # tries before a set of cells counts as too crowded
SUPERSAMPLING = 4

# A lone shape has few contents (960) and few questions: it is drawn half as often as the rest.
COUNT_WEIGHTS = (1, 2, 2, 2, 2)
# A new shape copies an earlier one's colour, and apart from that its kind, this often: else there is nothing to count.
REPEAT = 0.4
# Two of the ten answers at most are synonyms, so that the main answer always scores 100.
SYNONYMS = {
    "circle": "disc", "square": "box", "cross": "plus", "above": "over", "below": "under", "purple": "violet",
    "larger": "bigger", "fewer": "less", "same": "equal", "equal": "same", "yes": "yeah", "no": "nope",
    "0": "none", "1": "one", "2": "two", "3": "three", "4": "four", "5": "five",
}  # fmt: skip
NUMBERS = ("no", "one", "two", "three", "four", "five")
# Likelier answers get less weight, so that each question text has no likely answer.
ANSWER_WEIGHTS = {"2": 2.0, "3": 6.0, "4": 20.0, "5": 40.0, "same": 0.4, "equal": 6.0}


class Shape(NamedTuple):
    """One shape: what it is, its cell, and where its centre lies, in pixels."""

    color: str
    kind: str
    size: str
    column: int
    row: int
    x: float = 0.0
    y: float = 0.0
    half: float = 0.0


class Question(NamedTuple):
    """A question with ten answers; the first one is the main answer."""

    question: str
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


class Scene(NamedTuple):
    """Shapes from left to right (and from the top where columns agree), and the seed of everything said about them."""

    name: str
    shapes: tuple[Shape, ...]


def scenes(split: str, size: int, seed: int = 0, max_shapes: int = MAX_SHAPES) -> Iterator[Scene]:
    """Give `size` scenes of a split, the same for the same seed, passing over those of more than `max_shapes` shapes;
    ValueError for a split that does not exist, or `max_shapes` outside 1 to 5."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}")
    if not 1 <= max_shapes <= MAX_SHAPES:
        raise ValueError(f"max_shapes={max_shapes} must be between 1 and {MAX_SHAPES}")
    names = (f"scene-{split}-{seed}-{index}" for index in count())
    drawn = (Scene(name, _shapes(split, random.Random(name))) for name in names)
    yield from islice((scene for scene in drawn if len(scene.shapes) <= max_shapes), size)


def split_of(shapes: Sequence[Shape]) -> str:
    """Give the one split that may show these shapes in these cells: 80 % train, 10 % eval, 10 % test."""
    content = sorted((shape.color, shape.kind, shape.size, shape.column, shape.row) for shape in shapes)
    bucket = hashlib.blake2b(repr(content).encode(), digest_size=4).digest()
    return {0: "eval", 1: "test"}.get(int.from_bytes(bucket, "big") % 10, "train")


def _shapes(split: str, rng: random.Random) -> tuple[Shape, ...]:
    while True:
        shapes = _content(rng)
        if split_of(shapes) != split:
            continue
        for _ in range(PLACEMENTS):
            placed = [_placed(shape, rng) for shape in shapes]
            if all(max(abs(a.x - b.x), abs(a.y - b.y)) > a.half + b.half + GAP for a, b in combinations(placed, 2)):
                return tuple(placed)


def _content(rng: random.Random) -> list[Shape]:
    number = rng.choices(range(1, MAX_SHAPES + 1), COUNT_WEIGHTS)[0]
    colors, kinds = [], []
    for values, drawn in ((tuple(COLORS), colors), (KINDS, kinds)):
        for _ in range(number):
            drawn.append(rng.choice(drawn) if drawn and rng.random() < REPEAT else rng.choice(values))
        rng.shuffle(drawn)
    cells = sorted(divmod(cell, GRID) for cell in rng.sample(range(GRID * GRID), number))
    sizes = rng.choices(tuple(SIZES), k=number)
    return [Shape(*known, *cell) for *known, cell in zip(colors, kinds, sizes, cells)]


def _placed(shape: Shape, rng: random.Random) -> Shape:
    half = SIZES[shape.size] / 2 + rng.uniform(-0.25, 0.25)
    x, y = (
        min(max((cell + 0.5) * CELL + rng.uniform(-JITTER, JITTER), half + 1), SIDE - half - 1)
        for cell in (shape.column, shape.row)
    )
    return shape._replace(x=x, y=y, half=half)


def picture(scene: Scene) -> Image.Image:
    """Draw a scene: an RGB picture of 64x64 pixels."""
    rng = random.Random(f"{scene.name} picture")
    background = tuple(rng.randint(228, 252) for _ in range(3))
    canvas = Image.new("RGB", (SIDE * SUPERSAMPLING, SIDE * SUPERSAMPLING), background)
    draw = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        color = tuple(min(max(channel + rng.randint(-12, 12), 0), 255) for channel in COLORS[shape.color])
        corners = [(shape.x + shape.half * x, shape.y + shape.half * y) for x, y in _OUTLINES[shape.kind]]
        draw.polygon([(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in corners], fill=color)
    return canvas.reduce(SUPERSAMPLING)


def _around(radii: Sequence[float]) -> list[tuple[float, float]]:
    """Place points clockwise at equal angles, the first at the top."""
    angles = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles)]


# Corners, in halves of a shape's size from its centre. A star fills little of its box: enlarged, it looks as large.
_OUTLINES = {
    "circle": _around([1.0] * 48),
    "star": _around([1.12, 0.46] * 5),
    "square": [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "cross": [
        (-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36),
        (0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36),
    ],
}  # fmt: skip


def captions(scene: Scene) -> tuple[str, ...]:
    """Give five differently worded captions; all name the shapes from left to right."""
    names = [f"a {shape.size} {shape.color} {shape.kind}" for shape in scene.shapes]
    listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    count = f"{NUMBERS[len(names)]} {plural('shape', len(names))}"
    order = "from left to right there are" if len(names) > 1 else "in the picture there is"
    return (
        listed,
        f"the picture shows {listed}",
        f"{count}: {listed}",
        f"{order} {listed}",
        ", then ".join(names) if len(names) > 1 else f"only {listed}",
    )


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


# A family of questions gives (answer, question) for all it can ask of a scene without doubt; choosing comes later.
Asked = Iterator[tuple[str, str]]


def matching(scene: Scene, **wanted: str) -> tuple[Shape, ...]:
    return tuple(s for s in scene.shapes if all(getattr(s, field) == value for field, value in wanted.items()))


def references(scene: Scene, *choices: str) -> Iterator[tuple[Shape, str]]:
    """Pair shapes with phrases that fit no other shape; a choice names the fields told: "size kind"."""
    for choice in choices:
        told = [tuple(getattr(shape, field) for field in choice.split()) for shape in scene.shapes]
        for shape, words in zip(scene.shapes, told):
            if told.count(words) == 1:
                yield shape, " ".join(("the", *words, *(() if "kind" in choice else ("shape",))))


def named_shapes(scene: Scene, *choices: str) -> dict[Shape, str]:
    """Give the shapes that a phrase fits alone, each with the first such phrase."""
    return dict(reversed(list(references(scene, *choices))))


def _pairs(scene: Scene, *choices: str) -> Iterator[tuple[Shape, str, Shape, str]]:
    named = named_shapes(scene, *choices)
    return ((a, named[a], b, named[b]) for a, b in permutations(named, 2))


def _apart(dx: float, dy: float, least: float) -> Iterator[tuple[str, str]]:
    """Give (true side, false side) for each axis with at least this distance."""
    for distance, sides in ((dx, ("left of", "right of")), (dy, ("above", "below"))):
        if abs(distance) >= least:
            yield sides if distance < 0 else sides[::-1]


def sides_of(shape: Shape, other: Shape | None = None) -> Asked:
    """Give (side, choice) about a shape and another one, or the middle, which it may not cover."""
    x, y, least = (other.x, other.y, MARGIN) if other else (SIDE / 2, SIDE / 2, shape.half)
    for side, _ in _apart(shape.x - x, shape.y - y, least):
        yield side, "left or right of" if side.endswith("of") else "above or below"


def _what_color(scene: Scene) -> Asked:
    for shape, name in references(scene, "", "kind", "size kind"):
        yield shape.color, f"what color is {name}?"
        yield shape.color, f"what is the color of {name}?"


def _what_shape(scene: Scene) -> Asked:
    return ((shape.kind, f"what is {name}?") for shape, name in references(scene, "", "color", "size color"))


def _how_many(scene: Scene) -> Asked:
    yield str(len(scene.shapes)), "how many shapes are there?"


def _how_many_of(scene: Scene) -> Asked:
    for field, value, noun in VALUES:
        yield str(len(matching(scene, **{field: value}))), f"how many {plural(noun, 2)} are there?"


def _is_there(scene: Scene) -> Asked:
    present = {(shape.color, shape.kind) for shape in scene.shapes}
    colors, kinds = zip(*present)
    for color, kind in product(COLORS, KINDS):
        if (color, kind) in present:
            yield "yes", f"is there a {color} {kind}?"
        else:
            # A telling "no" has the colour and the kind, but on different shapes: it is drawn more often.
            weight = 3 if color in colors and kind in kinds else 1
            yield from [("no", f"is there a {color} {kind}?")] * weight


def _is_it(scene: Scene) -> Asked:
    for (shape, name), color in product(references(scene, "kind", "size kind"), COLORS):
        yield "yes" if shape.color == color else "no", f"is {name} {color}?"


def _is_beside(scene: Scene) -> Asked:
    for a, name_a, b, name_b in _pairs(scene, "color kind", "size color kind"):
        for true_side, false_side in _apart(a.x - b.x, a.y - b.y, MARGIN):
            yield "yes", f"is {name_a} {true_side} {name_b}?"
            yield "no", f"is {name_a} {false_side} {name_b}?"


def _which_side(scene: Scene) -> Asked:
    for a, name_a, b, name_b in _pairs(scene, "color kind", "size color kind"):
        yield from ((side.split()[0], f"is {name_a} {choice} {name_b}?") for side, choice in sides_of(a, b))


def _which_half(scene: Scene) -> Asked:
    for shape, name in references(scene, "kind", "color kind"):
        yield from ((side.split()[0], f"is {name} {choice} the middle?") for side, choice in sides_of(shape))


def _which_size(scene: Scene) -> Asked:
    for a, name_a, b, name_b in _pairs(scene, "color kind"):
        answer = "same" if a.size == b.size else {"large": "larger", "small": "smaller"}[a.size]
        yield answer, f"is {name_a} larger than {name_b}, smaller or the same?"


def _more_or_fewer(scene: Scene) -> Asked:
    counts = [(field, noun, len(matching(scene, **{field: value}))) for field, value, noun in VALUES]
    for (field_a, a, count_a), (field_b, b, count_b) in permutations(counts, 2):
        if field_a == field_b and count_a + count_b:
            answer = "equal" if count_a == count_b else "more" if count_a > count_b else "fewer"
            yield answer, f"are there more {plural(a, 2)} than {plural(b, 2)}, fewer or equally many?"


def _same_color(scene: Scene) -> Asked:
    for a, name_a, b, name_b in _pairs(scene, "kind", "size kind"):
        yield "yes" if a.color == b.color else "no", f"do {name_a} and {name_b} have the same color?"


VALUES = [("color", color, f"{color} shape") for color in COLORS] + [("kind", kind, kind) for kind in KINDS]
# Answer type -> {question type: family}; a scene is asked one question of each answer type that it allows.
_FAMILIES: dict[str, dict[str, Callable[[Scene], Asked]]] = {
    "color": {"what color": _what_color},
    "shape": {"what is": _what_shape},
    "count": {"how many shapes": _how_many, "how many": _how_many_of},
    "yes/no": {"is there": _is_there, "is it": _is_it, "is it beside": _is_beside},
    "position": {"which side": _which_side, "which half": _which_half},
    "comparison": {"which size": _which_size, "more or fewer": _more_or_fewer, "same color": _same_color},
}


def questions(scene: Scene) -> tuple[Question, ...]:
    """Give one unambiguous question of every answer type that the scene allows (rarely, one or two are missing)."""
    rng = random.Random(f"{scene.name} questions")
    asked = []
    for answer_type, families in _FAMILIES.items():
        for question_type in rng.sample(list(families), len(families)):
            if options := list(families[question_type](scene)):
                answer, question = balanced(options, rng)
                others = [SYNONYMS[answer]] * rng.randint(0, 2) if answer in SYNONYMS else []
                answers = ([answer] * 10 + others)[-10:]
                asked.append(Question(question, tuple(answers), question_type, answer_type))
                break
    return tuple(asked)


# What a lookup asks of a shape, and how it may name it: by nothing when the shape is alone.
_LOOKUPS = {"color": ("", "kind"), "kind": ("", "color", "size color")}
_LOOKUPS |= dict.fromkeys(("size", "column", "row"), ("", "kind", "color kind"))


def lookups(scene: Scene) -> tuple[Question, ...]:
    """Give at most six short questions, each about one field of one shape, named last.

    To find a shape by its name and read something off it is the hard part of most questions; here it is asked bare.
    There are none where no shape has a name of its own. Columns and rows count from one.
    """
    rng = random.Random(f"{scene.name} lookups")
    asked = {}
    for field in rng.choices(list(_LOOKUPS), k=6):
        options = []
        for shape, name in references(scene, *_LOOKUPS[field]):
            value = getattr(shape, field)
            options.append((value if isinstance(value, str) else NUMBERS[value + 1], f"{field} of {name}?"))
        if options:
            answer, question = balanced(options, rng)
            asked[question] = Question(question, (answer,) * 10, "lookup", field)
    return tuple(asked.values())


# What is learned last, and how often it is asked alone.
_PLACES = {"which half": 2, "which side": 2, "is it beside": 1, "which size": 1}


def places(scene: Scene) -> tuple[Question, ...]:
    """Give at most six questions about where shapes lie and how large they are beside each other, worded as in
    `questions`; none where no shape has a name of its own that such a question takes."""
    rng = random.Random(f"{scene.name} places")
    asked = {}
    for question_type in rng.choices(list(_PLACES), list(_PLACES.values()), k=6):
        (answer_type,) = (kind for kind, families in _FAMILIES.items() if question_type in families)
        if options := list(_FAMILIES[answer_type][question_type](scene)):
            answer, question = balanced(options, rng)
            asked[question] = Question(question, (answer,) * 10, question_type, answer_type)
    return tuple(asked.values())


def balanced(options: Sequence[tuple], rng: random.Random) -> tuple:
    """Choose an answer, then one of the options with that answer (their first item)."""
    answers = sorted({option[0] for option in options})
    answer = rng.choices(answers, [ANSWER_WEIGHTS.get(answer, 1.0) for answer in answers])[0]
    return rng.choice([option for option in options if option[0] == answer])
