# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The fields of a part with experts: how many, who visits them, how they are balanced; each validated.

Decoder, connector and tower share them, each with its own numbers in its own config.
"""

import math

from transformers import PretrainedConfig
from transformers.activations import ACT2FN

# Bounds of routing numbers; 1e-6 stands for: above 0.
RANGES = {"router_jitter_noise": (0, 1), "shared_expert_mix": (0, 1), "router_top_p": (1e-6, 1)}
RANGES |= {"routed_scaling_factor": (1e-6, 1e6), "expert_capacity_factor": (1e-6, 1e6)}
RANGES |= {"router_global_entropy_threshold": (1e-6, 1e6)}

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


def check_activations(config):
    for name in ("hidden_act", "expert_act", "projector_act"):
        if getattr(config, name, "gelu") not in ACT2FN:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown; transformers has {', '.join(ACT2FN)}")


class ExpertsConfig(PretrainedConfig):
    """A config with the choice `experts_implementation`, which both lines take in `from_pretrained` and never store."""

    @property
    def experts_implementation(self):
        """Name of the experts' implementation, see `experts_moevlm.py`; None stands for "auto"."""
        return self._experts_implementation

    @experts_implementation.setter
    def experts_implementation(self, value):
        self._experts_implementation = value

    if not hasattr(PretrainedConfig, "_experts_implementation"):  # transformers 4

        @property
        def _experts_implementation(self):
            return self.__dict__.get("_experts_implementation_internal")

        @_experts_implementation.setter
        def _experts_implementation(self, value):
            own = self._experts_implementation
            self._experts_implementation_internal = value.get("", own) if isinstance(value, dict) else value
            for name in self.sub_configs:
                part = self.__dict__.get(name)
                if part is not None:
                    kept = part._experts_implementation
                    part._experts_implementation = value.get(name, kept) if isinstance(value, dict) else value

        def _remove_keys_not_serialized(self, d):
            d.pop("_experts_implementation_internal", None)
            super()._remove_keys_not_serialized(d)


class SparseConfig(ExpertsConfig):
    r"""
    The fields that every part with experts shares: decoder, connector and tower.

    With `x` a token, `w_e` the router's row of expert e, all in float32: logits `l_e = w_e x`, scores `s_e`; the K
    experts with the largest `s_e + b_e` are visited with weights `g_e`; output `sum_e g_e expert_e(x)`.

    Args:
        num_experts: E, routed experts of a sparse layer.
        num_experts_per_tok: K, experts a token visits; 1 <= K <= E. May be changed after loading, or for one call by
            `forward(num_experts_per_tok=...)` and `generate(num_experts_per_tok=...)`.
        moe_intermediate_size: F, width of one expert.
        norm_topk_prob: Whether the K weights are renormalised to sum to 1: `g_e = s_e / sum_kept s` (Mixtral,
            arXiv:2401.04088, sec. 2.1), else `g_e = s_e`. With K = 1 it makes the weight 1, and routers learn
            nothing from the answers.
        scoring_func: "softmax", `s = softmax(l)` (Shazeer et al. 2017, arXiv:1701.06538, eq. 3), or "sigmoid",
            `s_e = sigmoid(l_e)`, so that experts do not compete for weight (DeepSeek-V3, arXiv:2412.19437, eq. 15).
        routed_scaling_factor: Factor on the weights (DeepSeek-V2, arXiv:2405.04434).
        use_router_bias: Whether `b_e` exists, a float32 buffer for loss-free balancing, which training moves by
            [`MoeVlmRouter.update_bias`]; it counts in the choice, never in a weight (Wang et al. 2024,
            arXiv:2408.15664). Without it `b_e = 0`.
        n_group: Groups of neighbouring experts, equally large; 1 is one pool.
        topk_group: Groups a token may visit: of the largest sums of their two largest `s_e + b_e` (DeepSeek-V3).
        router_top_p: Dynamic width, 0 < p <= 1: of the K experts only as many as needed for their probabilities
            (`s` divided by its sum) to reach p, at least one; None visits all K (Huang et al. 2024, arXiv:2403.07652).
        expert_modalities: Decoder only: for each expert "shared", "image" or "text", the tokens that may visit it, by
            `l_e = -inf` elsewhere; generated tokens are text. None shares all (cf. MoMa, arXiv:2407.21770).
        router_jitter_noise: eps; in training the router sees `x * u`, u uniform in 1 +- eps (Switch, arXiv:2101.03961).
        n_shared_experts: Always-on experts, built as one expert of `n_shared_experts * moe_intermediate_size`.
        shared_expert_gate: Whether a sigmoid gate scales the shared expert's output (Qwen2-MoE, arXiv:2407.10671).
        shared_expert_mix: None: `routed + shared` (DeepSeekMoE, arXiv:2401.06066, eq. 9). A number m in [0, 1]:
            `(1 - m) * routed + m * shared`, which keeps the scale where both are copies of one dense layer.
        expert_capacity_factor: Vision tower only: each expert takes `ceil(factor * K * N / E)` of the N tokens of a
            call, further visits are dropped, in training and inference; None drops none (V-MoE, arXiv:2106.05974).
        batch_priority_routing: Whether, under a capacity, tokens of the largest probability come first; else in order
            (V-MoE, sec. 4.1). First choices come before second choices either way.
        router_aux_loss_coef: Weight of the per-layer balance loss `E * sum_e f_e P_e` (Switch, eq. 4-6), f_e the share
            of visits, P_e the mean probability; under `expert_modalities` each modality's over its own experts.
        router_aux_loss_per_modality: Whether the decoder's is the mean of the text tokens' and the image tokens' own.
        router_z_loss_coef: Weight of the router z-loss, mean `logsumexp(l)^2` (ST-MoE, arXiv:2202.08906, eq. 5).
        router_local_entropy_coef: Weight of the mean entropy of a token's probabilities, so that routers decide;
            mean of the modalities (LIMoE, arXiv:2206.02770).
        router_global_entropy_coef: Weight of `max(0, threshold - entropy of the mean probabilities)`, so that a
            modality uses several experts; mean of the modalities (LIMoE).
        router_global_entropy_threshold: In nats; ln n asks for at least n experts. None: ln of the experts allowed.
        output_router_logits: Whether outputs hold the router logits without being asked.
        initializer_range: Standard deviation of initial weights.
    """

    def __init__(
        self,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        scoring_func="softmax",
        routed_scaling_factor=1.0,
        use_router_bias=False,
        n_group=1,
        topk_group=1,
        router_top_p=None,
        expert_modalities=None,
        router_jitter_noise=0.0,
        n_shared_experts=0,
        shared_expert_gate=False,
        shared_expert_mix=None,
        expert_capacity_factor=None,
        batch_priority_routing=False,
        router_aux_loss_coef=0.01,
        router_aux_loss_per_modality=False,
        router_z_loss_coef=0.001,
        router_local_entropy_coef=0.0,
        router_global_entropy_coef=0.0,
        router_global_entropy_threshold=None,
        output_router_logits=False,
        initializer_range=0.02,
        **kwargs,
    ):
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.norm_topk_prob = norm_topk_prob
        self.scoring_func = scoring_func
        self.routed_scaling_factor = routed_scaling_factor
        self.use_router_bias = use_router_bias
        self.n_group = n_group
        self.topk_group = topk_group
        self.router_top_p = router_top_p
        self.expert_modalities = None if expert_modalities is None else list(expert_modalities)
        self.router_jitter_noise = router_jitter_noise
        self.n_shared_experts = n_shared_experts
        self.shared_expert_gate = shared_expert_gate
        self.shared_expert_mix = shared_expert_mix
        self.expert_capacity_factor = expert_capacity_factor
        self.batch_priority_routing = batch_priority_routing
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_aux_loss_per_modality = router_aux_loss_per_modality
        self.router_z_loss_coef = router_z_loss_coef
        self.router_local_entropy_coef = router_local_entropy_coef
        self.router_global_entropy_coef = router_global_entropy_coef
        self.router_global_entropy_threshold = router_global_entropy_threshold
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.output_router_logits = output_router_logits

    def own_fields(self):
        """Every field as a dict that the class takes: `to_dict` without what transformers adds."""
        added = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "auto_map"}
        return {name: value for name, value in self.to_dict().items() if name not in added and name[0] != "_"}

    @property
    def modality_experts(self):
        """The experts that text tokens may visit, then those for image tokens: two lists of E bools."""
        kinds = self.expert_modalities or ["shared"] * self.num_experts
        return [[kind in ("shared", modality) for kind in kinds] for modality in ("text", "image")]

    @property
    def max_experts_per_tok(self):
        """The most experts that every token can be given, whatever its groups and its modality."""
        size, reached = self.num_experts // self.n_group, []
        for allowed in self.modality_experts:
            groups = [sum(allowed[start : start + size]) for start in range(0, self.num_experts, size)]
            # The poorest groups; those without an allowed expert are never chosen.
            reached.append(sum(sorted(filter(None, groups))[: self.topk_group]))
        return min(reached)

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
        check_positive(self, ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"))
        self._check_ranges()
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r} must be 'softmax' or 'sigmoid'")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}; "
                "lower it or add experts"
            )
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group} must divide num_experts={self.num_experts} and be at least "
                f"topk_group={self.topk_group}"
            )
        self._check_modalities()
        self._check_effects()
        if self.num_experts_per_tok > self.max_experts_per_tok:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.max_experts_per_tok} experts that "
                f"some token can reach under n_group={self.n_group}, topk_group={self.topk_group}, "
                f"expert_modalities={self.expert_modalities}; lower it, raise topk_group or share more experts"
            )

    def _check_ranges(self):
        coefficients = [name for name in vars(self) if name.startswith("router_") and name.endswith("_coef")]
        for name in ("n_shared_experts", *coefficients):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and finite; 0 switches it off")
        for name, (lowest, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= most:
                raise ValueError(f"{name}={value} must lie between {lowest} and {most}; leave it out to switch it off")

    def _check_effects(self):
        """Raise `ValueError` for an option that would do nothing without another."""
        for name in ("shared_expert_mix", "shared_expert_gate"):
            if self._is_set(name) and not self.n_shared_experts:
                raise ValueError(f"{name}={getattr(self, name)} needs n_shared_experts of at least 1")
        if self.batch_priority_routing and self.expert_capacity_factor is None:
            raise ValueError("batch_priority_routing=True needs an expert_capacity_factor; without one none is dropped")
        allowed = min(map(sum, self.modality_experts))
        threshold, most = self.router_global_entropy_threshold, math.log(max(allowed, 1))
        if threshold is not None and threshold > most + 1e-6:
            raise ValueError(
                f"router_global_entropy_threshold={threshold} exceeds ln({allowed} experts allowed) = {most:.4f}; "
                "lower it, or leave it out for the experts allowed"
            )

    def _check_modalities(self):
        kinds = self.expert_modalities
        if kinds is not None and (len(kinds) != self.num_experts or set(kinds) - {"shared", "image", "text"}):
            raise ValueError(
                f"expert_modalities={kinds} must hold 'shared', 'image' or 'text' for each of the "
                f"num_experts={self.num_experts} experts"
            )

    def _is_set(self, name):
        return getattr(self, name) is not None and getattr(self, name) is not False

    def refuse(self, name, reason):
        """Raise `ValueError` if a field is set that this part has no use for."""
        if self._is_set(name):
            raise ValueError(f"{name}={getattr(self, name)} is not for {self.model_type}: {reason}; leave it out")
