# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Every architectural number of MoeVlm, its default and its bound."""

from transformers import PretrainedConfig

# One map for both transformers lines: 4.57 loads by the old name, 5.x by the new ones.
AUTO_MAP = {
    "AutoConfig": "configuration_moevlm.MoeVlmConfig",
    "AutoModel": "modeling_moevlm.MoeVlmModel",
    "AutoModelForVision2Seq": "modeling_moevlm.MoeVlmForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_moevlm.MoeVlmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_moevlm.MoeVlmForConditionalGeneration",
}

MOE_LAYER_RULES = ("none", "alternate", "first_half", "last_half", "all")


def layer_types_from(moe_layers, num_hidden_layers):
    """The `mlp_layer_types` list, "dense" or "sparse" per layer, that a rule or a list of indices stands for.

    Args:
        moe_layers: One of `MOE_LAYER_RULES`, or a list of layer indices that shall be sparse.
        num_hidden_layers: Length of the result.

    Raises:
        ValueError: unknown rule, or an index outside the stack.

    Source: "alternate" (every second layer, ending with the last) is the best trade found by MoE-LLaVA
    (arXiv:2401.15947, table 7).
    """
    layers = range(num_hidden_layers)
    if isinstance(moe_layers, str):
        if moe_layers not in MOE_LAYER_RULES:
            raise ValueError(
                f"moe_layers={moe_layers!r} is no rule; take one of {MOE_LAYER_RULES} or a list of layer indices"
            )
        half = num_hidden_layers // 2
        sparse = {
            "none": (),
            "alternate": [i for i in layers if (num_hidden_layers - 1 - i) % 2 == 0],
            "first_half": layers[:half],
            "last_half": layers[half:],
            "all": layers,
        }[moe_layers]
    else:
        sparse = list(moe_layers)
        outside = [i for i in sparse if i not in layers]
        if outside:
            raise ValueError(f"moe_layers names {outside}, but there are layers 0..{num_hidden_layers - 1} only")
    return ["sparse" if i in sparse else "dense" for i in layers]


def check_positive(config, names):
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


class SparseConfig(PretrainedConfig):
    r"""
    The fields that every part with experts shares: decoder, connector and tower.

    Args:
        num_experts: E, routed experts of a sparse layer.
        num_experts_per_tok: K, experts a token visits; 1 <= K <= E.
        moe_intermediate_size: F, width of one expert.
        norm_topk_prob: Whether the K weights are renormalised to sum to 1.
        n_shared_experts: Always-on experts, built as one expert of `n_shared_experts * moe_intermediate_size`.
        router_aux_loss_coef: Weight of the per-layer balance loss (Switch, arXiv:2101.03961, eq. 4-6).
        router_z_loss_coef: Weight of the router z-loss (ST-MoE, arXiv:2202.08906, eq. 5).
        output_router_logits: Whether outputs hold the router logits without being asked.
        initializer_range: Standard deviation of initial weights.
    """

    def __init__(
        self,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        n_shared_experts=0,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        output_router_logits=False,
        initializer_range=0.02,
        **kwargs,
    ):
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.n_shared_experts = n_shared_experts
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.output_router_logits = output_router_logits

    def check_layer_types(self):
        """Raise `ValueError` unless `mlp_layer_types` has "dense" or "sparse" for each layer."""
        unknown = set(self.mlp_layer_types) - {"dense", "sparse"}
        if unknown:
            raise ValueError(f"mlp_layer_types holds {sorted(unknown)}; each entry is 'dense' or 'sparse'")
        if len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(self.mlp_layer_types)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}; give one entry a layer"
            )

    def check_sparse(self):
        """Raise `ValueError` naming field, value and bound unless a sparse layer can be built."""
        check_positive(self, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}; "
                "lower it or add experts"
            )
        for name in ("n_shared_experts", "router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 switches it off")


class MoeVlmVisionConfig(SparseConfig):
    r"""
    The vision tower: a pre-norm ViT whose feed-forward layers are dense or sparse.

    Args:
        hidden_size: Width D of the tower.
        intermediate_size: Width of a dense feed-forward layer.
        num_hidden_layers: Number of ViT blocks; 0 leaves the stem alone.
        num_attention_heads: Heads; must divide `hidden_size`.
        num_channels: Channels of a picture.
        image_size: Side of the square picture, in pixels, that the position embeddings are made for.
        patch_size: Side of the square, in pixels, that becomes one token.
        stem: "patch" (one convolution, as SigLIP and CLIP) or "conv" (3x3 stride-2 convolutions with BatchNorm,
            which makes small towers trainable from scratch; Xiao et al. 2021, arXiv:2106.14881).
        stem_channels: Channels of each convolution of the "conv" stem; `patch_size` is 2 to the power of their number.
        hidden_act: Activation of the dense layers (SigLIP "gelu_pytorch_tanh", CLIP "quick_gelu").
        expert_act: Activation of the experts' gate.
        layer_norm_eps: Epsilon of the layer norms.
        attention_dropout: Dropout on attention weights while training.
        patch_bias: Whether the patch convolution has a bias (SigLIP yes, CLIP no).
        use_class_token: Whether a class token leads the patches (CLIP); the connector never sees it.
        use_pre_layernorm: Whether a norm follows the embeddings (CLIP).
        use_post_layernorm: Whether a norm follows the last block.
        moe_layers: Rule or indices for `mlp_layer_types`, see [`layer_types_from`].
        mlp_layer_types: "dense" or "sparse" for each block; wins over `moe_layers`.
        **kwargs: Fields of [`SparseConfig`].
    """

    model_type = "moevlm_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_channels=3,
        image_size=64,
        patch_size=16,
        stem="conv",
        stem_channels=(32, 64, 96, 128),
        hidden_act="gelu_pytorch_tanh",
        expert_act="silu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        patch_bias=True,
        use_class_token=False,
        use_pre_layernorm=False,
        use_post_layernorm=True,
        moe_layers="none",
        mlp_layer_types=None,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.stem = stem
        self.stem_channels = list(stem_channels)
        self.hidden_act = hidden_act
        self.expert_act = expert_act
        self.layer_norm_eps = layer_norm_eps
        self.attention_dropout = attention_dropout
        self.patch_bias = patch_bias
        self.use_class_token = use_class_token
        self.use_pre_layernorm = use_pre_layernorm
        self.use_post_layernorm = use_post_layernorm
        self.mlp_layer_types = mlp_layer_types or layer_types_from(moe_layers, num_hidden_layers)
        super().__init__(**kwargs)
        self._check()

    def _check(self):
        check_positive(self, ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size"))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is below patch_size={self.patch_size}; enlarge the picture")
        if self.stem not in ("patch", "conv"):
            raise ValueError(f"stem={self.stem!r} must be 'patch' or 'conv'")
        if self.stem == "conv" and 2 ** len(self.stem_channels) != self.patch_size:
            raise ValueError(
                f"stem_channels={self.stem_channels} shrinks a picture {2 ** len(self.stem_channels)} times, but "
                f"patch_size={self.patch_size}; give log2(patch_size) channels or change patch_size"
            )
        self.check_layer_types()
        if "sparse" in self.mlp_layer_types:
            self.check_sparse()

    @property
    def patches_per_side(self):
        """Patches along one side of a picture of `image_size` pixels (a remainder is dropped, as in SigLIP)."""
        return self.image_size // self.patch_size


class MoeVlmConnectorConfig(SparseConfig):
    r"""
    The connector: pixel shuffle, a projector, and optionally a sparse block behind it.

    Args:
        pixel_shuffle_factor: r; squares of r x r patches become one token of r*r times the width.
        projector: "linear" (as SmolVLM) or "mlp" (two layers, as LLaVA).
        projector_act: Activation of the "mlp" projector.
        projector_bias: Whether the projector's layers have biases.
        hidden_size: Width behind the projector, which is the decoder's; set by [`MoeVlmConfig`].
        expert_act: Activation of the experts' gate.
        rms_norm_eps: Epsilon of the norm in front of the sparse block.
        **kwargs: Fields of [`SparseConfig`]; `num_experts` 0 (the default here) leaves the sparse block out.
    """

    model_type = "moevlm_connector"
    base_config_key = "connector_config"

    def __init__(
        self,
        pixel_shuffle_factor=1,
        projector="mlp",
        projector_act="gelu",
        projector_bias=True,
        hidden_size=128,
        expert_act="silu",
        rms_norm_eps=1e-6,
        **kwargs,
    ):
        self.pixel_shuffle_factor = pixel_shuffle_factor
        self.projector = projector
        self.projector_act = projector_act
        self.projector_bias = projector_bias
        self.hidden_size = hidden_size
        self.expert_act = expert_act
        self.rms_norm_eps = rms_norm_eps
        super().__init__(**{"num_experts": 0, **kwargs})
        self._check()

    def _check(self):
        check_positive(self, ("pixel_shuffle_factor", "hidden_size"))
        if self.projector not in ("linear", "mlp"):
            raise ValueError(f"projector={self.projector!r} must be 'linear' or 'mlp'")
        if self.num_experts:
            self.check_sparse()


class MoeVlmTextConfig(SparseConfig):
    r"""
    The decoder: pre-norm blocks with RMSNorm, RoPE, grouped-query attention and SwiGLU, dense or sparse.

    Args:
        vocab_size: Number of token embeddings.
        hidden_size: Width D.
        intermediate_size: Width of a dense feed-forward layer.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; must divide `num_attention_heads`.
        head_dim: Width of a head; `hidden_size // num_attention_heads` when None.
        hidden_act: Activation of dense layers and of the experts' gate.
        max_position_embeddings: Longest sequence that the positions are made for.
        rms_norm_eps: Epsilon of the norms.
        attention_bias: Whether q, k and v have biases (Qwen2).
        use_qk_norm: Whether q and k heads are normalised (Qwen3).
        attention_dropout: Dropout on attention weights while training.
        rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0, ...}`, transformers' form.
        tie_word_embeddings: Whether the head reuses the token embeddings.
        use_cache: Whether keys and values are cached by default.
        embedding_initializer_range: Standard deviation of initial token embeddings; `initializer_range` when None.
        moe_layers: Rule or indices for `mlp_layer_types`, see [`layer_types_from`].
        mlp_layer_types: "dense" or "sparse" for each layer; wins over `moe_layers`.
        pad_token_id, bos_token_id, eos_token_id: Token ids.
        **kwargs: Fields of [`SparseConfig`].
    """

    model_type = "moevlm_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        attention_bias=False,
        use_qk_norm=False,
        attention_dropout=0.0,
        rope_parameters=None,
        tie_word_embeddings=False,
        use_cache=True,
        embedding_initializer_range=None,
        moe_layers="alternate",
        mlp_layer_types=None,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.use_qk_norm = use_qk_norm
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        self.embedding_initializer_range = embedding_initializer_range
        self.mlp_layer_types = mlp_layer_types or layer_types_from(moe_layers, num_hidden_layers)
        rope_parameters = dict(rope_parameters or {"rope_type": "default", "rope_theta": 10000.0})
        # Before the base class: transformers 5 fills in what is missing, and the checkpoint would mean something else.
        missing = {"rope_type", "rope_theta"} - set(rope_parameters)
        if missing:
            raise ValueError(f"rope_parameters={rope_parameters} lacks {sorted(missing)}; give both")
        # transformers 5 drops these four from the base class, 4.57 sets them there: both ways they must arrive.
        kwargs.update(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        kwargs.update(tie_word_embeddings=tie_word_embeddings)
        # 4.57 reads the two attributes, 5.x the dict (and would warn about the attributes).
        kwargs.pop("rope_theta", None)
        kwargs.pop("rope_scaling", None)
        self.rope_parameters = rope_parameters
        if not hasattr(PretrainedConfig, "rope_scaling"):  # transformers 4
            self.rope_theta = rope_parameters.get("rope_theta")
            self.rope_scaling = None if rope_parameters.get("rope_type") == "default" else rope_parameters
        super().__init__(**kwargs)
        self._check()

    def _check(self):
        check_positive(
            self,
            ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            + ("num_key_value_heads", "head_dim", "max_position_embeddings"),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        self.check_layer_types()
        if "sparse" in self.mlp_layer_types:
            self.check_sparse()

    @property
    def expert_act(self):
        """The experts' activation, under the name that tower and connector use."""
        return self.hidden_act


class MoeVlmConfig(PretrainedConfig):
    r"""
    The whole model: a vision tower, a connector and a decoder.

    Args:
        vision_config: [`MoeVlmVisionConfig`] or its dict.
        text_config: [`MoeVlmTextConfig`] or its dict.
        connector_config: [`MoeVlmConnectorConfig`] or its dict.
        image_token_id: Id of the token that stands for one image token in `input_ids`.
        tie_word_embeddings: Same as the decoder's; kept equal.

    Example:

    ```python
    >>> config = MoeVlmConfig(text_config={"num_experts": 4})
    >>> config.image_seq_length
    16
    ```
    """

    model_type = "moevlm"
    sub_configs = {
        "vision_config": MoeVlmVisionConfig,
        "connector_config": MoeVlmConnectorConfig,
        "text_config": MoeVlmTextConfig,
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        connector_config=None,
        image_token_id=5,
        **kwargs,
    ):
        self.vision_config = self._part("vision_config", vision_config)
        self.connector_config = self._part("connector_config", connector_config)
        self.text_config = self._part("text_config", text_config)
        self.image_token_id = image_token_id
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        # transformers 4.57 reads this flag from the text config, 5.x from here; token ids are read from both.
        for name in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
            if name in kwargs:
                setattr(self.text_config, name, kwargs[name])
            kwargs[name] = getattr(self.text_config, name)
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The config of a stored dict; one of another model is refused, where transformers warns and takes defaults."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"model_type={found!r} is another model's, not {cls.model_type!r}; load it with its own class"
            )
        return super().from_dict(config_dict, **kwargs)

    def _part(self, name, value):
        config_class = self.sub_configs[name]
        if value is None:
            return config_class()
        if isinstance(value, dict):
            return config_class(**value)
        if getattr(value, "model_type", None) != config_class.model_type:
            raise TypeError(f"{name} must be a dict or a {config_class.__name__}, got {type(value).__name__}")
        return value

    def _check(self):
        self.connector_config.hidden_size = self.text_config.hidden_size
        side, factor = self.vision_config.patches_per_side, self.connector_config.pixel_shuffle_factor
        if side % factor:
            raise ValueError(
                f"pixel_shuffle_factor={factor} does not divide the {side} patches of a side "
                f"(image_size={self.vision_config.image_size}, patch_size={self.vision_config.patch_size})"
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside the vocabulary of "
                f"vocab_size={self.text_config.vocab_size} tokens"
            )

    @property
    def image_seq_length(self):
        """Image tokens that one picture of `image_size` becomes in the decoder."""
        return (self.vision_config.patches_per_side // self.connector_config.pixel_shuffle_factor) ** 2


__all__ = ["AUTO_MAP", "MoeVlmConfig", "MoeVlmConnectorConfig", "MoeVlmTextConfig", "MoeVlmVisionConfig"]
