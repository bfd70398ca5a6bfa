# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The base class of every MoeVlm module, and most of what differs between transformers 4.57 and 5.x."""

import shutil
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .configuration_moevlm import AUTO_MAP, MoeVlmConfig
from .experts_moevlm import IMPLEMENTATIONS, MoeVlmExperts
from .routing_moevlm import MoeVlmCapacity, MoeVlmRouter, MoeVlmSelection
from .summary_moevlm import summarize

try:  # transformers 5
    from transformers import initialization as init
    from transformers.initialization import copy_ as init_copy_
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs
except ImportError:  # transformers 4
    from torch.nn import init
    from transformers.utils.generic import OutputRecorder, check_model_inputs

    capture_outputs = check_model_inputs

    def init_copy_(tensor, values):
        return tensor.copy_(values)

    def merge_with_config_defaults(forward):
        return forward


IS_TRANSFORMERS_5 = hasattr(PreTrainedModel, "_can_set_experts_implementation")

# What a checkpoint needs to be loaded elsewhere with trust_remote_code=True.
SHIPPED = (
    "sparsity",
    "configuration",
    "summary",
    "base",
    "routing",
    "router_losses",
    "kernels",
    "graphs",
    "generation",
    "experts",
    "vision",
    "modeling",
    "processing",
)

# One recorder a module: transformers 4 leaves a module wrapped for good when two record it.
ROUTER_RECORDERS = {
    "router_logits": OutputRecorder(MoeVlmRouter, index=0),
    "router_choices": OutputRecorder(MoeVlmSelection, index=0),
    "router_indices": OutputRecorder(MoeVlmCapacity, index=0),
}


def recorded(forward):
    """Let `output_hidden_states`, `output_attentions` and `output_router_logits` fill the outputs of `forward`."""
    return merge_with_config_defaults(capture_outputs(forward))


def attention_mask_for(config, inputs_embeds, attention_mask, past_key_values, position_ids, segment_ids, kwargs):
    """The causal mask in the form that the configured attention implementation takes, or None.

    Args:
        config: Decoder config.
        inputs_embeds: `(B, S, D)`; only shape, dtype and device are read.
        attention_mask: `(B, T)`, 1 for a real token, or an already prepared 4-D mask, returned as it is.
        past_key_values: Cache of T - S tokens, or None.
        position_ids: `(B, S)` or `(1, S)`.
        segment_ids: `(B, S)` or None; with it, token i sees token j <= i only where j's segment is 0 or i's own.
            Whole rows only: T = S.
        kwargs: Of the forward; transformers 4 passes `cache_position` in it.
    """
    arguments = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
    direct = takes_direct_mask(config, attention_mask)
    if segment_ids is not None:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            raise ValueError("segment_ids are not read beside a 4-D attention_mask; pass a 2-D one, or none")
        if "flash" in config._attn_implementation and segment_ids.any():
            raise ValueError(
                f"attn_implementation={config._attn_implementation} knows no segments, so that packed questions would "
                "read each other; use sdpa or flex_attention"
            )
        if past_key_values is not None and (past_key_values.is_compileable or past_key_values.get_seq_length()):
            raise ValueError("segment_ids are of a whole row; pass past_key_values=None or an empty DynamicCache")
        keys = segment_ids.unsqueeze(1)  # (B, 1, S)
        visible = (keys == 0) | (keys == segment_ids.unsqueeze(2))  # (B, S, S)
        if direct:
            places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
            return padded_causal_mask(attention_mask, places, visible=visible)

        def same_segment(batch, head, query, key):
            return visible[batch, query, key]

        # Positions that start again would be read as packed sequences, which segments already describe.
        arguments.update(and_mask_function=same_segment, position_ids=None)
    if IS_TRANSFORMERS_5:
        return create_causal_mask(config=config, inputs_embeds=inputs_embeds, **arguments)
    if direct:
        return padded_causal_mask(attention_mask, kwargs["cache_position"], past_key_values)
    return create_causal_mask(
        config=config, input_embeds=inputs_embeds, cache_position=kwargs["cache_position"], **arguments
    )


def takes_direct_mask(config, attention_mask):
    """Whether [`padded_causal_mask`] can stand for the library's mask: sdpa, a 2-D mask, no graph under way."""
    plain = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    under_way = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return plain and config._attn_implementation == "sdpa" and not under_way


def padded_causal_mask(attention_mask, cache_position, past_key_values=None, visible=None):
    """sdpa's causal mask `(B, 1, S, T)`, true where a token is seen, or None where `is_causal` says the same.

    The library makes it by vmap (5.x with segments only), which on a CPU takes longer than a step of a small model.

    Args:
        attention_mask: `(B, n)`, 1 for a real token; what the cache has room for beyond n is masked.
        cache_position: `(S,)`, places of the new tokens.
        past_key_values: A cache of T places, or None.
        visible: `(B, S, S)`, what else a token must be to be seen, or None.
    """
    count, length, start, static = len(cache_position), len(cache_position), 0, False
    if past_key_values is not None:
        length, start = past_key_values.get_mask_sizes(cache_position, 0)
        static = past_key_values.is_compileable
    seen = attention_mask.bool()[:, start : start + length]
    if visible is None and not static and (count == 1 or count == length) and seen.all():
        return None
    seen = F.pad(seen, (0, length - seen.shape[1]))  # (B, T)
    places = torch.arange(start, start + length, device=seen.device)
    mask = seen[:, None, None, :] & (places <= cache_position.unsqueeze(-1))
    return mask if visible is None else mask & visible.unsqueeze(1)


class MoeVlmPreTrainedModel(PreTrainedModel):
    """Weights' initialisation, what engines may do with the model, and saving with its code."""

    config_class = MoeVlmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoeVlmConnector", "MoeVlmDecoderLayer", "MoeVlmVisionEmbeddings", "MoeVlmVisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls):
        return True

    @classmethod
    def _can_set_experts_implementation(cls):
        return True

    def get_correct_experts_implementation(self, requested_experts):
        """The implementation that a wish, or None, means; ours need no registry. Raises `ValueError` if unknown."""
        if IS_TRANSFORMERS_5 and requested_experts not in (None, *IMPLEMENTATIONS.ours):
            return super().get_correct_experts_implementation(requested_experts)
        IMPLEMENTATIONS.get_interface(requested_experts, None)
        return requested_experts or "auto"

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: the config always carries the whole `auto_map`, and saving always copies the code."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, MoeVlmExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MoeVlmRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
            if module.allowed is not None:
                init_copy_(module.allowed, module.allowed_experts())

    @staticmethod
    def recording(wanted):
        """The arguments that make a forward record its routing, or not."""
        return {f"output_{name}": wanted for name in ROUTER_RECORDERS}

    def moe_summary(self):
        """Where the experts sit, parameters, operations, bytes: a [`MoeSummary`]; `print` shows it as a table."""
        return summarize(self)

    if not IS_TRANSFORMERS_5:

        def create_masks_for_generate(
            self, config, input_embeds, attention_mask, cache_position, past_key_values, position_ids=None, **kwargs
        ):
            """The mask of a step with a static cache, made before the compiled forward; see [`attention_mask_for`]."""
            config, place = config.get_text_config(), {"cache_position": cache_position}
            return attention_mask_for(config, input_embeds, attention_mask, past_key_values, position_ids, None, place)

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            """As in transformers 5, where the default is not the reentrant kind."""
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

        def set_experts_implementation(self, experts_implementation):
            """As in transformers 5: a name for all parts, or a dict of names by `sub_configs` key ("" for the rest)."""
            wishes = (
                experts_implementation if isinstance(experts_implementation, dict) else {"": experts_implementation}
            )
            for wish in wishes.values():
                self.get_correct_experts_implementation(wish)
            self.config._experts_implementation = experts_implementation

    def _set_gradient_checkpointing(self, *args, gradient_checkpointing_func=checkpoint, **kwargs):
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True would lose gradients of the router losses; leave it out, or False")
        run_again = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(*args, gradient_checkpointing_func=run_again, **kwargs)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` uploads before it returns.
        copy_code(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save weights, config and the code that loads them, so that any machine can with `trust_remote_code=True`.

        The canonical `auto_map` is written whatever class the model has become: FSDP2 swaps it for one of torch's.
        """
        if self.config.model_type == MoeVlmConfig.model_type:  # a part has no Auto class
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            copy_code(save_directory)


def copy_code(folder):
    """Copy the shipped source files that stand beside this one into `folder`."""
    for name in SHIPPED:
        source = Path(__file__).with_name(f"{name}_moevlm.py")
        target = Path(folder) / source.name
        if source.exists() and source.resolve() != target.resolve():
            shutil.copyfile(source, target)
