# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""What the configs of parents mean in ours: one function per part, and the dense config that they make together."""

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .base_moevlm import IS_TRANSFORMERS_5
from .configuration_moevlm import MoeVlmConfig

TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
VISION_FAMILIES = ("siglip", "siglip2", "clip")
WHOLE_FAMILIES = ("smolvlm", "idefics3", "llava", "moevlm")
# What may stand in a parent's config only as given here: our decoder has no switch for anything else.
TEXT_DEMANDS = {"mlp_bias": False, "clip_qkv": None, "partial_rotary_factor": 1.0, "no_rope_layers": None}

# What config.json holds besides fields, on one line or the other.
WRITTEN_BESIDE = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
# What 4.57 writes beside rope_parameters, which alone are read.
MIRRORS = {"rope_theta", "rope_scaling"}


def check_fields(given: Any, kind: type[PretrainedConfig], place: str) -> None:
    """Check the fields that a JSON file gives for one of our configs.

    Raises:
        ValueError: It is no object, or has a field that such configs do not have; the nearest that they have is named.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{place} is {given!r}; make it an object of fields")
    known = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    known |= {*kind().to_dict(), *WRITTEN_BESIDE}
    known = known | MIRRORS if "rope_parameters" in given else known - MIRRORS
    for field in sorted(set(given) - known):
        close = ["rope_parameters"] if field in MIRRORS else difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "take it out"
        raise ValueError(f"{place} has no field {field!r}; {hint}")


def refuse_unknown(family: str | None, source: str) -> None:
    """Raise for a `model_type` that transformers does not know, before it does so without naming ours.

    Raises:
        ValueError: It is unknown; the known ones are listed.
    """
    if family not in CONFIG_MAPPING:
        text, tower, whole = map(", ".join, (TEXT_FAMILIES, VISION_FAMILIES, WHOLE_FAMILIES))
        raise ValueError(
            f"{source}: transformers does not know model_type={family!r}, nor do we; known are, for the text, {text}; "
            f"for the tower, {tower}; whole, {whole}"
        )


def is_tied(config: PretrainedConfig) -> bool:
    """Whether a parent's config shares head and embeddings: of a whole one 4.57 asks the text part, 5.x the whole."""
    return (config if IS_TRANSFORMERS_5 else config.get_text_config()).tie_word_embeddings


def feature_layer_of(config: PretrainedConfig) -> int | list[int]:
    """The layer of its tower that a whole parent reads; several of a LLaVA that joins them."""
    layer = getattr(config, "vision_feature_layer", -1)
    return layer[0] if isinstance(layer, list | tuple) and len(layer) == 1 else layer


def picture_remarks(settings: Mapping[str, Any]) -> list[str]:
    """What a parent's image processor does to the shape of a picture, and ours does not; nothing without a difference.

    Args:
        settings: Of its preprocessor_config.json.
    """
    size = settings.get("size")
    edges = isinstance(size, Mapping) and ("shortest_edge" in size or "longest_edge" in size)
    habits = {
        "cuts out the centre": settings.get("do_center_crop"),
        "pads": settings.get("do_pad"),
        "keeps the proportions": edges or settings.get("max_num_patches"),  # the latter is SigLIP2's NaFlex
    }
    named = [habit for habit, found in habits.items() if found]
    if not named:
        return []
    return [f"the parent's image processor {', '.join(named)}; here each picture is scaled to a square"]


def text_fields(config: PretrainedConfig, notes: list[str]) -> dict[str, Any]:
    """Fields of `MoeVlmTextConfig` that rebuild the decoder of `config`; remarks go to `notes`.

    Raises:
        ValueError: An unknown family (the known ones are listed), or a feature that our decoder has no switch for.
    """
    family = config.model_type
    if family == "moevlm_text":
        return config.own_fields()
    if family not in TEXT_FAMILIES:
        raise ValueError(f"model_type={family!r} is no known text parent; known are {', '.join(TEXT_FAMILIES)}")
    for name, wanted in TEXT_DEMANDS.items():
        if getattr(config, name, wanted) != wanted:
            raise ValueError(
                f"{name}={getattr(config, name)!r} of the {family} parent has no place here: {wanted!r} only"
            )
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe") and getattr(config, "attention_bias", False):
        raise ValueError(f"attention_bias=True of the {family} parent also has o_proj.bias, which has no place here")
    heads = config.num_attention_heads
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope_of(config),
        "initializer_range": config.initializer_range,
        "attention_bias": family in ("qwen2", "qwen2_moe") and getattr(config, "qkv_bias", True),
        "use_qk_norm": family in ("qwen3", "qwen3_moe", "olmoe"),
        **{name: getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        "moe_layers": "none",
    }
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    used = getattr(config, "use_sliding_window", family not in ("llama", "olmoe")) and "sliding_attention" in kinds
    if window and used and window < config.max_position_embeddings:
        fields["max_position_embeddings"] = window
        notes.append(f"the parent sees {window} tokens back (sliding_window); the model is exact up to that length")
    return fields | sparse_fields(config)


def sparse_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What a sparse text parent adds to its dense fields; nothing for a dense one."""
    family, layers = config.model_type, config.num_hidden_layers
    if family not in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        return {}
    fields = {
        "num_experts": config.num_local_experts if family == "mixtral" else config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        # Mixtral always renormalises.
        "norm_topk_prob": family == "mixtral" or config.norm_topk_prob,
        # transformers' balance loss is K of an even load, ours 1.
        "router_aux_loss_coef": config.router_aux_loss_coef * config.num_experts_per_tok,
    }
    sparse = set(range(layers))
    if family in ("qwen2_moe", "qwen3_moe"):
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
        sparse = {i for i in range(layers) if i not in dense and step > 0 and (i + 1) % step == 0}
    if family == "qwen2_moe":
        width, unit = config.shared_expert_intermediate_size, config.moe_intermediate_size
        if width % unit:
            raise ValueError(f"shared_expert_intermediate_size={width} is no multiple of moe_intermediate_size={unit}")
        fields |= {"n_shared_experts": width // unit, "shared_expert_gate": True}
    if family == "olmoe":
        fields["qk_norm_per_head"] = False
    fields["mlp_layer_types"] = ["sparse" if i in sparse else "dense" for i in range(layers)]
    return fields


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary settings in the form of transformers 5, from either line's config."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        parameters = {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            **(getattr(config, "rope_scaling", None) or {}),
        }
        parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    return {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}


def vision_fields(config: PretrainedConfig, feature_layer: int = -1) -> dict[str, Any]:
    """Fields of `MoeVlmVisionConfig` that rebuild the tower of `config`.

    Args:
        feature_layer: Which hidden state feeds the connector, counted as transformers counts them: -1 the last, with
            the final norm where the family's output has it; -2 (LLaVA's choice) leaves out the last block.

    Raises:
        ValueError: An unknown family, or a layer outside the tower.
    """
    family = config.model_type.removesuffix("_vision_model").removesuffix("_vision")
    if family == "moevlm":
        return config.own_fields()
    if family not in (*VISION_FAMILIES, "idefics3", "smolvlm"):
        raise ValueError(
            f"model_type={config.model_type!r} is no known vision parent; known are {', '.join(VISION_FAMILIES)}"
        )
    layers = feature_layer if feature_layer >= 0 else config.num_hidden_layers + 1 + feature_layer
    if not 0 <= layers <= config.num_hidden_layers:
        raise ValueError(f"vision_feature_layer={feature_layer} is outside the {config.num_hidden_layers} blocks")
    clip = family == "clip"
    size = math.isqrt(config.num_patches) * config.patch_size if family == "siglip2" else config.image_size
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "image_size": size,
        "patch_size": config.patch_size,
        "stem": "patch",
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "patch_bias": not clip,
        "use_class_token": clip,
        "use_pre_layernorm": clip,
        # CLIP normalises its pooled output only.
        "use_post_layernorm": not clip and layers == config.num_hidden_layers,
    }


def connector_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Fields of `MoeVlmConnectorConfig` that rebuild the connector of a whole model.

    Raises:
        ValueError: An unknown family, several feature layers, or a feature that this model has no place for.
    """
    family = config.model_type
    if family == "moevlm":
        return config.connector_config.own_fields()
    if family in ("smolvlm", "idefics3"):
        return {"projector": "linear", "projector_bias": False, "pixel_shuffle_factor": config.scale_factor}
    if family != "llava":
        raise ValueError(f"model_type={family!r} is no known whole model; known are {', '.join(WHOLE_FAMILIES)}")
    if not isinstance(feature_layer_of(config), int):
        raise ValueError(f"vision_feature_layer={config.vision_feature_layer} joins several layers; one only")
    kept_class = config.vision_feature_select_strategy != "default"
    if kept_class and "clip" in config.vision_config.model_type:
        raise ValueError("vision_feature_select_strategy='full' keeps CLIP's class token, which has no place here")
    if not kept_class and "siglip" in config.vision_config.model_type:
        raise ValueError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without a class token "
            f"({config.vision_config.model_type}), which has no place here; 'full' only"
        )
    return {
        "projector": "mlp",
        "projector_act": config.projector_hidden_act,
        "projector_bias": config.multimodal_projector_bias,
        "pixel_shuffle_factor": 1,
    }


def whole_remarks(family: str) -> list[str]:
    """What a whole parent of a family does otherwise than the model made of it."""
    if family not in ("smolvlm", "idefics3"):
        return []
    notes = ["a picture is one square: the parent's cutting of large pictures is left out"]
    if not IS_TRANSFORMERS_5:
        notes.append(
            "transformers 4.57 places this parent's patches one row and one column too low; the model places them as "
            "the parent was trained, and the proof corrects the parent"
        )
    return notes


def dense_config(
    configs: Mapping[str, Any],
    *,
    vocab_size: int,
    image_token_id: int,
    tied: bool,
    feature_layer: int = -1,
    projector: str = "mlp",
    pixel_shuffle_factor: int | None = None,
) -> tuple[MoeVlmConfig, list[str]]:
    """The config of the parents joined as they are, and remarks.

    Args:
        configs: Either "whole", or "text" and "vision"; a vision parent may be a dict of `MoeVlmVisionConfig` fields,
            a tower from scratch.
        vocab_size: Tokens of the tokenizer; the vocabulary grows to it where the parent's is smaller.
        image_token_id: The placeholder's id.
        tied: Whether head and embeddings are one.
        feature_layer: Of a vision parent, see [`vision_fields`]; a whole parent knows its own.
        projector, pixel_shuffle_factor: Of a new connector; the factor is by default the smallest from 2 to 4 that
            divides the patches of a side, else 1.

    Raises:
        ValueError: A parent that does not fit, by the name of its field; a decoder that is too short for a picture.
    """
    notes = whole_remarks(configs["whole"].model_type) if "whole" in configs else []
    if whole := configs.get("whole"):
        connector, text_config, vision_config = connector_fields(whole), whole.text_config, whole.vision_config
        feature_layer = feature_layer_of(whole)
    else:
        text_config = getattr(configs["text"], "text_config", configs["text"])
        vision_config = configs["vision"]
        vision_config = getattr(vision_config, "vision_config", vision_config)
        connector = {"projector": projector}
    own = isinstance(vision_config, dict) or vision_config.model_type.startswith("moevlm")
    if own and not whole and feature_layer != -1:
        raise ValueError(f"vision_feature_layer={feature_layer} is for towers of others; ours say num_hidden_layers")
    vision = vision_config if isinstance(vision_config, dict) else vision_fields(vision_config, feature_layer)
    if whole and whole.model_type == "llava":
        vision["use_post_layernorm"] = False  # it reads hidden states, the last one too before the final norm
    if "pixel_shuffle_factor" not in connector:
        side = MoeVlmConfig(vision_config=dict(vision)).vision_config.patches_per_side
        fitting = [factor for factor in (2, 3, 4) if side % factor == 0]
        connector["pixel_shuffle_factor"] = pixel_shuffle_factor or (fitting[0] if fitting else 1)
    text = text_fields(text_config, notes) | {"tie_word_embeddings": tied}
    if vocab_size > text["vocab_size"]:
        notes.append(f"the vocabulary grows from {text['vocab_size']} to {vocab_size} tokens")
        text["vocab_size"] = vocab_size
    config = MoeVlmConfig(
        text_config=text, vision_config=vision, connector_config=connector, image_token_id=image_token_id
    )
    positions, picture = config.text_config.max_position_embeddings, config.image_seq_length
    if positions <= picture:
        raise ValueError(
            f"a picture takes {picture} tokens, but the text parent sees {positions} (max_position_embeddings, or a "
            "smaller sliding_window); raise pixel_shuffle_factor, or take another parent"
        )
    return config, notes
