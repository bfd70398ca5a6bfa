# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Where each tensor of a parent goes: rules per part, and a dense twin of ours that reads through them.

Nothing is left over in silence: a key of a parent is used, merged into a stacked tensor, or dropped with a reason.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from .summary_moevlm import CONNECTOR, DECODER, TOWER

LAYER = r"layers\.\d+\."

# Each rule: what the key looks like without its part's prefix, and its name with us (\g<0> stands for the whole match).
Rules = tuple[tuple[str, str], ...]
TEXT_RULES: Rules = (
    (r"embed_tokens\.weight|norm\.weight", DECODER + r"\g<0>"),
    (LAYER + r"(?:input_layernorm|post_attention_layernorm)\.weight", DECODER + r"\g<0>"),
    (LAYER + r"self_attn\.(?:[qkvo]_proj|[qk]_norm)\.(?:weight|bias)", DECODER + r"\g<0>"),
    (LAYER + r"mlp\.(?:shared_expert\.)?(?:gate|up|down)_proj\.weight", DECODER + r"\g<0>"),
    (LAYER + r"mlp\.(?:shared_expert_gate\.weight|experts\.(?:gate_up|down)_proj)", DECODER + r"\g<0>"),
    (r"(" + LAYER + r")(?:mlp|block_sparse_moe)\.gate\.weight", DECODER + r"\1mlp.gate.weight"),
    (r"lm_head\.weight", r"\g<0>"),
)
VISION_RULES: Rules = (
    (r"embeddings\.(?:patch_embedding\.(?:weight|bias)|position_embedding\.weight|class_embedding)", TOWER + r"\g<0>"),
    (r"pre_layr?norm\.(weight|bias)", TOWER + r"pre_layernorm.\1"),
    (r"post_layernorm\.(?:weight|bias)", TOWER + r"\g<0>"),
    (
        r"encoder\.(" + LAYER + r"(?:layer_norm[12]|self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])\.(?:weight|bias))",
        TOWER + r"\1",
    ),
)
CONNECTOR_RULES: Rules = (
    (r"modality_projection\.proj\.weight", CONNECTOR + "projector.weight"),
    (r"linear_1\.(weight|bias)", CONNECTOR + r"projector.0.\1"),
    (r"linear_2\.(weight|bias)", CONNECTOR + r"projector.2.\1"),
)
# One expert's matrix: a row of a stacked tensor of ours, and which half of it.
EXPERT = re.compile(rf"({LAYER})(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_SLOTS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
# Prefixes of a whole model's parts, tried in this order; both transformers lines, new and old checkpoints.
WHOLE: tuple[tuple[str, Rules], ...] = (
    (r"(?:model\.)?(?:vision_tower|vision_model)\.(?:vision_model\.)?", VISION_RULES),
    (r"(?:model\.)?(?:connector|multi_modal_projector)\.", CONNECTOR_RULES),
    (r"(?:model\.)?(?:(?:language_model|text_model)\.)?(?:model\.)?", TEXT_RULES),
)
KINDS: dict[str, tuple[tuple[str, Rules], ...]] = {
    "text": ((r"(?:model\.)?", TEXT_RULES),),
    "vision": ((r"(?:vision_model\.)?", VISION_RULES),),
    "whole": WHOLE,
    "own": ((r"", ((r"model\..+|lm_head\.weight", r"\g<0>"),)),),
}
POOLING = (r"(?:.*(?:vision_model|vision_tower)\.)?head\..*", "pooling head; the connector reads every patch")
OTHER_SIDE = r"text_model\..*|logit_(?:scale|bias)|(?:visual|text)_projection\.weight"
COMPUTED = (
    (r"(?:.*\.)?rotary_emb\.inv_freq", "computed from rope_parameters"),
    (r"(?:.*\.)?position_ids", "counted anew"),
)
DROPPED = {
    "text": COMPUTED,
    "vision": (*COMPUTED, POOLING, (OTHER_SIDE, "the text side of a vision parent")),
    "whole": (*COMPUTED, POOLING),
    "own": (),
}
# Keys that have a name with us, but that this model has no place for.
UNPLACED = (
    (r"lm_head\.weight", "tied to the token embeddings"),
    (
        re.escape(TOWER) + r"post_layernorm\..*",
        "no norm follows the feature layer (CLIP norms its pooled output only; LLaVA reads before it)",
    ),
    (re.escape(TOWER) + r"layers\..*", "behind vision_feature_layer"),
)


class Piece(NamedTuple):
    """A tensor of the parent, and the place in a tensor of ours that it fills."""

    source: str
    expert: int | None = None  # row of a stacked tensor
    half: int | None = None  # 0: gate, 1: up


@dataclass
class KeyMap:
    """Every key of one parent: where it went, or why not."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)  # our key: what fills it
    dropped: dict[str, str] = field(default_factory=dict)  # parent's key: reason

    @property
    def used(self) -> dict[str, str]:
        """Keys that became one tensor of ours each: the parent's key, and ours."""
        return {pieces[0].source: key for key, pieces in self.pieces.items() if len(pieces) == 1}

    @property
    def merged(self) -> dict[str, str]:
        """Keys that became a part of a stacked tensor: the parent's key, and ours."""
        return {piece.source: key for key, pieces in self.pieces.items() if len(pieces) > 1 for piece in pieces}


def place(key: str, kind: str) -> tuple[str, Piece] | None:
    """Our key, and the piece of it, for a key of a parent; None without a rule."""
    for prefix, rules in KINDS[kind]:
        found = re.match(prefix, key)
        rest = key[found.end() :] if found else ""
        for pattern, ours in rules:
            if match := re.fullmatch(pattern, rest):
                return match.expand(ours), Piece(key)
        expert = EXPERT.fullmatch(rest)
        if expert and expert[3] in EXPERT_SLOTS and rules is TEXT_RULES:
            name, half = EXPERT_SLOTS[expert[3]]
            return f"{DECODER}{expert[1]}mlp.experts.{name}", Piece(key, int(expert[2]), half)
    return None


def listing(keys: list[str]) -> str:
    """The first eight keys, and how many more there are."""
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def reason_for(key: str, reasons: Iterable[tuple[str, str]]) -> str | None:
    """The reason beside the first pattern that the whole key matches, None without one."""
    return next((reason for pattern, reason in reasons if re.fullmatch(pattern, key)), None)


def map_keys(keys: Iterable[str], kind: str, ours: Iterable[str], parts: tuple[str, ...] | None = None) -> KeyMap:
    """Account for every key of a parent.

    Args:
        keys: The parent's.
        kind: One of `KINDS`.
        ours: Keys of the dense twin.
        parts: Prefixes of our keys that this parent shall fill; None for all that it can.

    Raises:
        ValueError: Keys that no rule knows; they are listed. Two keys for one place.
    """
    result, unknown, ours, taken = KeyMap(), [], set(ours), {}
    for key in keys:
        placed = place(key, kind)
        if placed and parts is not None and not placed[0].startswith(parts):
            result.dropped[key] = "another parent fills this part"
        elif placed and placed[0] in ours:
            target, piece = placed
            other = taken.setdefault((target, piece.expert, piece.half), key)
            if other != key:
                raise ValueError(f"the {kind} parent has both {other} and {key} for {target}; remove the one not meant")
            result.pieces.setdefault(target, []).append(piece)
        elif reason := reason_for(placed[0], UNPLACED) if placed else reason_for(key, DROPPED[kind]):
            result.dropped[key] = reason
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"the {kind} parent has tensors without a place here: {listing(unknown)}; its config asks for something "
            "that this model has no switch for"
        )
    return result


def map_parents(parents: Mapping[str, Any], ours: Iterable[str]) -> dict[str, KeyMap]:
    """The map of each parent that has weights, by role; a parent of our own family may fill a single part.

    Args:
        parents: Parents by role, with `family` and `weights`.
        ours: Keys of the dense twin.
    """
    own_parts = {"whole": None, "text": (DECODER, "lm_head."), "vision": (TOWER,)}
    maps = {}
    for role, parent in parents.items():
        own = parent.family == "moevlm"
        if parent.weights:
            maps[role] = map_keys(parent.weights, "own" if own else role, ours, own_parts[role] if own else None)
    return maps


class DenseTwin(Mapping):
    """The parents under our names and in our shapes: each tensor is read, and stacked, when it is asked for.

    Args:
        shapes: Shape of every tensor of the twin.
        parents: Pairs of a parent's tensors and their map.
        fresh: Tensors of parts without a parent.

    Raises:
        ValueError: A tensor of the twin that nothing fills, or a shape that does not fit, named on both sides.
    """

    def __init__(
        self,
        shapes: Mapping[str, Size],
        parents: Iterable[tuple[Mapping[str, Tensor], KeyMap]],
        fresh: Mapping[str, Tensor],
    ):
        self.shapes, self.fresh = shapes, fresh
        self.sources = {key: (weights, map_.pieces[key]) for weights, map_ in parents for key in map_.pieces}
        missing = [key for key in shapes if key not in self.sources and key not in fresh]
        if missing:
            raise ValueError(f"no parent fills {listing(missing)}; the checkpoint is not whole")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.sources:
            return self.fresh[key]
        weights, pieces = self.sources[key]
        shape = self.shapes[key]
        if pieces[0].expert is None:
            tensor = in_our_form(key, weights[pieces[0].source], shape)
            self._check(key, pieces[0].source, tensor.shape, shape)
            return tensor
        return self._stacked(key, weights, pieces)

    def _stacked(self, key: str, weights: Mapping[str, Tensor], pieces: list[Piece]) -> Tensor:
        """The experts' matrices of a sparse parent as one tensor, `(E, 2F, D)` or `(E, D, F)`."""
        shape = self.shapes[key]
        experts, width = shape[0], shape[1] // 2
        wanted = {(e, half) for e in range(experts) for half in ((0, 1) if pieces[0].half is not None else (None,))}
        if {(piece.expert, piece.half) for piece in pieces} != wanted:
            raise ValueError(f"{key} wants {experts} whole experts, but the parent has {len(pieces)} of {len(wanted)}")
        stacked = None
        for piece in pieces:
            tensor = weights[piece.source]
            if stacked is None:
                stacked = torch.empty(shape, dtype=tensor.dtype)
            row = stacked[piece.expert]
            if piece.half is not None:
                row = row[piece.half * width : (piece.half + 1) * width]
            self._check(key, piece.source, tensor.shape, row.shape)
            row.copy_(tensor)
        return stacked

    @staticmethod
    def _check(key: str, source: str, found: Size, wanted: Size) -> None:
        if found != wanted:
            raise ValueError(
                f"{source} of the parent is {tuple(found)}, but {key} takes {tuple(wanted)}; config and weights of the "
                "parent do not belong together"
            )


def in_our_form(key: str, tensor: Tensor, shape: Size) -> Tensor:
    """Two forms that differ: SigLIP2 cuts patches by a linear layer; a vocabulary may have grown.

    New rows of the vocabulary are the mean of the old ones, whose logit never is the largest.
    """
    if key.endswith("patch_embedding.weight") and tensor.ndim == 2 and len(shape) == 4:
        _, channels, rows, columns = shape
        if tensor.shape[1] == channels * rows * columns:
            return tensor.unflatten(1, (rows, columns, channels)).permute(0, 3, 1, 2).contiguous()  # (D, C, p, p)
    if key in (f"{DECODER}embed_tokens.weight", "lm_head.weight"):
        new = shape[0] - tensor.shape[0]
        if new > 0 and tensor.shape[1:] == shape[1:]:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            return torch.cat([tensor, mean.expand(new, -1)])
    return tensor
