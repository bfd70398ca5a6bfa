# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Proof that an upcycled model is its parents': their outputs side by side, on text and on pictures.

Shapes: B rows, S sequence, I pictures, P patches, V vocabulary, D hidden.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base_moevlm import IS_TRANSFORMERS_5
from .configuration_moevlm import MoeVlmConfig
from .modeling_moevlm import MoeVlmForConditionalGeneration
from .summary_moevlm import sparse_layers

ROWS, TEXT_LENGTH = 2, 48
# Of float32, as a share of the largest logit: identity modes must stay below.
BOUND = 1e-4
# In a sparse parent float error decides between experts that are nearly tied, and a token then differs in earnest. A
# wrong map spoils nearly all positions; where no larger share of them is off, it was such a tie.
TIED = 0.1


class Probe(NamedTuple):
    """Inputs that parent and model both see."""

    text: Tensor  # (B, S) ids
    mixed: Tensor  # (B, S) ids, one picture's placeholders in each row
    pictures: Tensor  # (B, C, H, W)


class Outputs(NamedTuple):
    """What one of the two made of a [`Probe`]; None where it has no such part."""

    text: Tensor  # (B, S, V) logits
    pictures: Tensor  # (B, S, V) logits
    tower: Tensor | None  # (I, P, D)


def probe_of(config: MoeVlmConfig, vocab_size: int, placeholder: int, seed: int = 0) -> Probe:
    """Random ids below `vocab_size`, the parent's, and random pictures of the tower's size.

    Args:
        placeholder: The parent's own, which no other id of the probe shall be.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(TEXT_LENGTH, config.text_config.max_position_embeddings - config.image_seq_length)
    ids = torch.randint(0, vocab_size, (2, ROWS, length), generator=generator)
    # Placeholders stand where pictures go, nowhere else.
    taken = {config.image_token_id, placeholder}
    for token in taken:
        ids[ids == token] = next(other for other in range(vocab_size) if other not in taken)
    placeholders = torch.full((ROWS, config.image_seq_length), config.image_token_id)
    mixed = torch.cat([ids[1, :, :1], placeholders, ids[1, :, 1:]], dim=1)
    vision = config.vision_config
    size = (ROWS, vision.num_channels, vision.image_size, vision.image_size)
    return Probe(ids[0], mixed, torch.randn(size, generator=generator))


@torch.no_grad()
def outputs_of_model(model: MoeVlmForConditionalGeneration, probe: Probe) -> Outputs:
    """What the upcycled model, in float32, makes of the probe."""
    return Outputs(
        model(input_ids=probe.text, use_cache=False).logits,
        model(input_ids=probe.mixed, pixel_values=probe.pictures, use_cache=False).logits,
        model.model.vision_tower(probe.pictures).last_hidden_state,
    )


@torch.no_grad()
def outputs_of_whole(parent: nn.Module, probe: Probe, image_token_id: int) -> Outputs:
    """What a whole vision-language parent makes of the probe."""
    family, pictures = parent.config.model_type, probe.pictures
    if family in ("idefics3", "smolvlm"):
        pictures = pictures.unsqueeze(1)  # (B, 1, C, H, W): one picture a row, not cut
        if not IS_TRANSFORMERS_5:
            parent.model.vision_model.embeddings.register_forward_hook(true_positions, with_kwargs=True)
    mixed = probe.mixed.masked_fill(probe.mixed == image_token_id, parent_image_token(parent.config))
    return Outputs(
        parent(input_ids=probe.text, use_cache=False).logits,
        parent(input_ids=mixed, pixel_values=pictures, use_cache=False).logits,
        None,
    )


def true_positions(embeddings, arguments, named, patches):
    """A hook that gives each patch of a whole square its own position.

    transformers 4.57 rounds the patches' coordinates down by one row and column (position 0 comes twice); 5.x does not,
    nor did the code that trained these parents.
    """
    pixel_values = arguments[0] if arguments else named["pixel_values"]
    return embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + embeddings.position_embedding.weight


def parent_image_token(config) -> int:
    """Id of the placeholder of a whole parent; LLaVA's older name for it too."""
    return next(getattr(config, name) for name in ("image_token_id", "image_token_index") if hasattr(config, name))


@torch.no_grad()
def features_of_tower(parent: nn.Module, pictures: Tensor, feature_layer: int) -> Tensor:
    """Patches `(I, P, D)` of a vision parent, without a class token."""
    family = parent.config.model_type
    if family == "moevlm":
        return parent.vision_tower(pictures).last_hidden_state
    if family.startswith("siglip2"):
        side = math.isqrt(parent.config.num_patches)
        patch = parent.config.patch_size
        rows = pictures.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # (I, C, side, p, side, p)
        patches = rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (I, side**2, p * p * C)
        arguments = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.full((len(pictures), 2), side),
        }
    else:
        arguments = {"pixel_values": pictures}
    outputs = parent(**arguments, output_hidden_states=True)
    # The last hidden state is behind the final norm, where the family has one there.
    last = feature_layer in (-1, parent.config.num_hidden_layers)
    states = outputs.last_hidden_state if last else outputs.hidden_states[feature_layer]
    return states[:, 1:] if family.startswith("clip") else states


@torch.no_grad()
def outputs_of_pair(text_parent: nn.Module, connector: nn.Module, features: Tensor, probe: Probe, image_token_id: int):
    """What a text parent makes of the probe, with pictures as the new connector hands them on.

    Args:
        connector: The upcycled model's, for which there is no parent.
        features: Patches `(I, P, D)` of the vision parent.
    """
    tokens = connector(features).last_hidden_state  # (I, image tokens, D)
    placeholders = probe.mixed == image_token_id
    embeddings = text_parent.get_input_embeddings()(probe.mixed.masked_fill(placeholders, 0))
    embeddings = embeddings.masked_scatter(placeholders.unsqueeze(-1).expand_as(embeddings), tokens)
    return Outputs(
        text_parent(input_ids=probe.text, use_cache=False).logits,
        text_parent(inputs_embeds=embeddings, use_cache=False).logits,
        features,
    )


def prove(
    model: MoeVlmForConditionalGeneration, parents: Mapping[str, Any], load: Callable, feature_layer: int
) -> dict[str, dict[str, float]]:
    """Run model and parents, in float32, on the same probe, and [`compare`] them.

    Args:
        model: Is turned to float32, and emptied before a parent is loaded, but for its connector: never more than one
            large model is in memory. It cannot be used afterwards.
        parents: By role, with `config` and `family`.
        load: Gives the module of a parent and its role.
        feature_layer: Of the vision parent.
    """
    config, dtype, model = model.config, model.dtype, model.float().eval()
    main = parents.get("whole") or parents["text"]
    settings = main.config.get_text_config()
    if main.family == "moevlm":  # whose dense configs have a number of experts too
        routed = bool(sparse_layers(main.config))
    else:
        routed = any(getattr(settings, name, None) for name in ("num_experts", "num_local_experts"))
    placeholder = parent_image_token(main.config) if "whole" in parents else config.image_token_id
    vocab_size = min(main.config.get_text_config().vocab_size, config.text_config.vocab_size)
    probe = probe_of(config, vocab_size, placeholder)
    ours, connector = outputs_of_model(model, probe), model.model.connector
    model.model.connector = None
    model.to("meta")
    if "whole" in parents:
        whole = rounded(load(main, "whole"), dtype)
        return compare(ours, outputs_of_whole(whole, probe, config.image_token_id), routed=routed)
    features = ours.tower
    if parents["vision"].family != "scratch":
        features = features_of_tower(rounded(load(parents["vision"], "vision"), dtype), probe.pictures, feature_layer)
    else:
        ours = ours._replace(tower=None)
    text = rounded(load(main, "text"), dtype)
    return compare(ours, outputs_of_pair(text, connector, features, probe, config.image_token_id), routed=routed)


@torch.no_grad()
def rounded(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in float32, its weights rounded to `dtype`: rounding is not what is to be found out."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    return module.float()


def compare(ours: Outputs, parents: Outputs, *, routed: bool = False) -> dict[str, dict[str, float]]:
    """Largest difference of each output to the parent's, and as a share of its largest value; nothing for None.

    Args:
        routed: Whether the parent's decoder chooses among experts; then also the share of positions above [`BOUND`].
    """
    table = {}
    for name in Outputs._fields:
        mine, theirs = getattr(ours, name), getattr(parents, name)
        if mine is None or theirs is None:
            continue
        differences = (mine[..., : theirs.shape[-1]] - theirs).abs().amax(-1)  # (B, S) or (I, P)
        largest, scale = differences.max().item(), theirs.abs().max().item() or 1.0
        table[name] = {"largest_difference": largest, "scale": scale, "relative": largest / scale}
        if routed and name != "tower":
            table[name]["positions_off"] = (~(differences / scale < BOUND)).float().mean().item()
    return table


def refuse_difference(proof: Mapping[str, Mapping[str, float]], outputs: Iterable[str] = Outputs._fields) -> None:
    """Raise unless these outputs, where the proof has them, are the parent's within float error.

    Raises:
        RuntimeError: A difference above [`BOUND`], with a sparse parent at more than [`TIED`] of the positions.
    """
    for name in proof.keys() & set(outputs):
        row = proof[name]
        if not row["relative"] < BOUND and row.get("positions_off", 1.0) > TIED:
            raise RuntimeError(
                f"{name}: the upcycled model differs from its parent by {row['largest_difference']:.3g}, "
                f"{row['relative']:.1e} of the scale, above {BOUND}; nothing was written"
            )


def refuse_other_files(stored: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise unless the files hold the model that is in memory: the same tensors, dtypes and values.

    Args:
        stored: The written checkpoint's tensors, read one at a time.
        model: Before [`prove`], which turns it to float32.

    Raises:
        RuntimeError: A tensor that is missing, too many, or another.
    """
    state = model.state_dict()
    if model.config.text_config.tie_word_embeddings:
        del state["lm_head.weight"]  # written once, as the embeddings
    written = set(stored)  # asking a mapping whether it holds a key would read the tensor
    other = written ^ set(state)
    for key in written & set(state):
        saved, tensor = stored[key], state[key]
        if saved.dtype != tensor.dtype or not torch.equal(saved, tensor):
            other.add(key)
    if other:
        raise RuntimeError(
            f"the written files differ from the model in {', '.join(sorted(other)[:8])}; nothing is kept"
        )


class Remembering(Mapping):
    """Tensors, and the dtype of each that was read so far."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.dtypes = tensors, {}

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.tensors[key]
        self.dtypes[key] = tensor.dtype
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def rounding(dtypes: Mapping[str, torch.dtype], fresh: Iterable[str], dtype: torch.dtype) -> list[str]:
    """A remark for each dtype of the parents' tensors whose values `dtype` does not hold.

    Args:
        dtypes: Of the twin's tensors.
        fresh: Keys of the twin that no parent fills.
        dtype: Of the result.
    """
    counts = Counter(found for key, found in dtypes.items() if key not in fresh and found.is_floating_point)
    return [
        f"{count} tensors rounded from {str(found)[6:]} to {str(dtype)[6:]}"
        for found, count in counts.items()
        if torch.promote_types(found, dtype) != dtype
    ]


def account_for(
    maps: Mapping[str, Any], twin: Iterable[str], ours: Iterable[str], fresh: Iterable[str]
) -> dict[str, Any]:
    """The keys part of a report: for each parent, by role, where every key of it went; then our new tensors.

    Args:
        maps: The `KeyMap` of each parent.
        twin: Keys of the dense twin.
        ours: Keys of the upcycled model.
        fresh: Keys of the twin that no parent fills.
    """
    twin, ours = set(twin), set(ours)
    report: dict[str, Any] = {}
    for role, keys in maps.items():
        # A key of the twin that the result has not: its layer became experts.
        used = {old: new if new in ours else f"{new.rpartition('.mlp.')[0]}.mlp.*" for old, new in keys.used.items()}
        report[role] = {
            "total": len(used) + len(keys.merged) + len(keys.dropped),
            "used": used,
            "merged": keys.merged,
            "dropped": keys.dropped,
        }
    made = {key for key in ours - twin if ".gate." in key or key.startswith("model.connector.")}
    return report | {"new": sorted(made | set(fresh) & ours)}


def table_of(report: Mapping[str, Any]) -> str:
    """The printed form of a report: differences, keys, parameters, remarks."""
    lines = []
    for of, rows in (("", report["proof"]), (" of the dense twin", report.get("proof_of_twin", {}))):
        lines += [
            f"{name + ':':<10} largest difference{of} to the parent {row['largest_difference']:.2e} at a scale of "
            f"{row['scale']:.3g} ({row['relative']:.1e})"
            + (f", off at {row['positions_off']:.1%} of positions" if row.get("positions_off") else "")
            for name, row in rows.items()
        ]
    if not report["proof"]:
        lines.append("proof:     skipped")
    for name, keys in report["keys"].items():
        if name != "new":
            lines.append(
                f"{name + ':':<10} {keys['total']} keys: {len(keys['used'])} used, {len(keys['merged'])} merged, "
                f"{len(keys['dropped'])} dropped"
            )
            reasons = sorted(set(keys["dropped"].values()))
            counts = [sum(reason == found for found in keys["dropped"].values()) for reason in reasons]
            lines += [f"{'':<10}   {count} dropped: {reason}" for count, reason in zip(counts, reasons)]
    lines.append(f"{'new:':<10} {len(report['keys']['new'])} tensors")
    for name in ("before", "after"):
        numbers = report["parameters"][name]
        lines.append(f"{name + ':':<10} {numbers['total']:,} parameters, {numbers['active']:,} active")
    return "\n".join(lines + [f"{'remark:':<10} {note}" for note in report["notes"]])
