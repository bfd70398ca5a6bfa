# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The experts themselves, and the block that joins them with their router.

Shapes: B batch, S sequence, N = B*S tokens, D hidden, E experts, K experts per token, F expert width.
"""

from functools import partial, wraps

import torch
from torch import nn
from transformers.activations import ACT2FN

from .graphs_moevlm import batched_experts, dense_experts, fits_grouped_mm, grouped_mm_experts, opaque_experts
from .kernels_moevlm import activation, decode_experts, eager_experts, grouped_experts, product_dtype, this_cpu
from .routing_moevlm import MoeVlmRouter

try:  # transformers 5: lets every engine that knows the interface replace the experts' forward
    from transformers.integrations import use_experts_implementation
    from transformers.integrations.moe import ExpertsInterface
except ImportError:  # transformers 4
    ExpertsInterface = dict

    def use_experts_implementation(*, experts_interface):
        """As in transformers 5: the config's `_experts_implementation` chooses what the forward of a class runs."""

        def decorate(experts_class):
            reference = experts_class.forward

            @wraps(reference)
            def forward(self, *args, **kwargs):
                run = experts_interface.get_interface(self.config._experts_implementation, reference)
                return run(self, *args, **kwargs)

            experts_class.forward = forward
            return experts_class

        return decorate


def on_parameters(run, hide=False):
    """`run` of the kernels as a function of the module and what was routed to it.

    With `hide`, torch.compile sees an operator in place of it: its shapes depend on the routing.
    """

    def forward(experts, hidden_states, top_k_index, top_k_weights):
        routed = hidden_states, top_k_index, top_k_weights
        weights = experts.gate_up_proj, experts.down_proj  # once: an adapter may compute them
        if hide and torch.compiler.is_compiling():
            return opaque_experts(*routed, *weights, experts.act_name)
        return run(*routed, *weights, experts.act_fn)

    return forward


def grouped_mm(experts, hidden_states, top_k_index, top_k_weights):
    """[`grouped_mm_experts`], which can do without masks where no visit is skipped."""
    run = partial(grouped_mm_experts, skips=experts._is_expert_parallel)
    return on_parameters(run)(experts, hidden_states, top_k_index, top_k_weights)


# Up to here, on CUDA, nearly every weight is read anyway, or copying those of the visits is cheap; on a CPU the sort,
# which a graph fuses, still shows beside the products.
FEW_TOKENS = 128
# On a CPU, in graphs: the weights of all visits, copied, stay near the core.
COPIED_BYTES = 2**21
# Dtypes in which `kernels_moevlm.one_call_pays` on this CPU: here, because a graph cannot ask it.
ONE_CALL = () if this_cpu().beyond_mkl else tuple({torch.bfloat16, torch.float32}.difference(this_cpu().slow))


def form_for(tokens, experts, gate_up):
    """The fastest form for this device, shape and purpose; on CUDA and in graphs one that never waits for the host.

    Returns:
        One of the kernels' functions, or None: `decode_experts`, which torch.compile must not look into.
    """
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    # An export takes any number of tokens: it must not ask.
    few = not exporting and not torch.is_grad_enabled() and len(tokens) <= FEW_TOKENS
    if tokens.is_cuda and few:
        # A copied weight is moved three times.
        return batched_experts if 3 * experts.numel() < len(gate_up) else dense_experts
    if (tokens.is_cuda or exporting) and fits_grouped_mm(tokens, gate_up):
        return grouped_mm_experts
    if exporting:
        return dense_experts
    # Under autocast either form would cast the weights of all experts at each call.
    if few and torch.compiler.is_compiling() and product_dtype(tokens, gate_up) == gate_up.dtype:
        if experts.numel() * 3 * gate_up.shape[1] // 2 * gate_up.shape[2] * gate_up.itemsize <= COPIED_BYTES:
            return batched_experts
        fits = fits_grouped_mm(tokens, gate_up, ONE_CALL)
        return grouped_mm_experts if fits and len(tokens) > 1 else None
    return None


def automatic(experts, hidden_states, top_k_index, top_k_weights):
    """What [`form_for`] chooses."""
    routed = hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj
    run = form_for(hidden_states, top_k_index, routed[3])
    if run is None:
        if torch.compiler.is_compiling():
            return opaque_experts(*routed, experts.act_name)
        run = decode_experts
    elif run is grouped_mm_experts:
        run = partial(run, skips=experts._is_expert_parallel)
    return run(*routed, experts.act_fn)


class Implementations(ExpertsInterface):
    """The implementations by name: ours, then those of transformers."""

    ours = {
        "auto": automatic,
        "grouped": on_parameters(grouped_experts, hide=True),
        "decode": on_parameters(decode_experts, hide=True),
        "dense": on_parameters(dense_experts),
    }
    # transformers 5 has its own by these names.
    spare = {"batched_mm": on_parameters(batched_experts), "grouped_mm": grouped_mm}

    def get_interface(self, name, default):
        """The function of that name, "auto" for None; "eager" is `default`.

        Raises:
            ValueError: no implementation has this name.
        """
        name = name or "auto"
        if name in self.ours:
            return self.ours[name]
        if name not in self.names():
            raise ValueError(f"experts_implementation={name!r} is unknown; take one of {self.names()}")
        return default if name == "eager" else self.get(name, self.spare.get(name))

    def names(self):
        """All names, ours first."""
        return [*self.ours, "eager", *sorted({*self.spare, *self})]


IMPLEMENTATIONS = Implementations()


@use_experts_implementation(experts_interface=IMPLEMENTATIONS)
class MoeVlmExperts(nn.Module):
    """E SwiGLU experts, stacked: the same tensors on disk, in memory and on both transformers lines."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_name, self.act_fn = config.expert_act, activation(config.expert_act)
        # How transformers 5 tells its expert kernels that the id `num_experts` occurs.
        self._is_expert_parallel = False
        IMPLEMENTATIONS.get_interface(config._experts_implementation, None)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """The weighted sum of each token's experts, by the implementation that `experts_implementation` names.

        Args:
            hidden_states: Tokens `(N, D)`.
            top_k_index: Experts `(N, K)`; the id `num_experts` marks a visit to skip (expert parallelism).
            top_k_weights: Weights `(N, K)`.

        Returns:
            `(N, D)` in the dtype of `hidden_states`.
        """
        return on_parameters(eager_experts)(self, hidden_states, top_k_index, top_k_weights)


class MoeVlmMLP(nn.Module):
    """A dense SwiGLU layer (Shazeer 2020, arXiv:2002.05202), also the shared expert of a sparse block."""

    def __init__(self, hidden_size, intermediate_size, activation):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states):
        """`(..., D)` -> `(..., D)`."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoeVlmSparseBlock(nn.Module):
    """A feed-forward layer of routed experts, plus a shared one if `n_shared_experts` > 0.

    The shared expert follows DeepSeekMoE (arXiv:2401.06066, eq. 9): its output is added to the routed sum, or mixed
    with it as `shared_expert_mix` says.

    Args:
        config: A part's.
        experts_class: What the routed experts are made of.
    """

    def __init__(self, config, experts_class=MoeVlmExperts):
        super().__init__()
        self.gate = MoeVlmRouter(config)
        self.experts = experts_class(config)
        self.skips_visits = config.router_top_p is not None or config.expert_capacity_factor is not None
        self.experts._is_expert_parallel = self.skips_visits
        self.shared_expert_mix = config.shared_expert_mix
        self.shared_expert, self.shared_expert_gate = None, None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_expert = MoeVlmMLP(config.hidden_size, width, config.expert_act)
        if config.n_shared_experts and config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states, image_mask=None, num_experts_per_tok=None):
        """One tensor, so that an engine can fuse the block; routing is recorded beside it.

        Args:
            hidden_states: `(..., D)`.
            image_mask: `(...)` bool, true for image tokens; None: all are text. Only `expert_modalities` asks for it.
            num_experts_per_tok: K of this call, or None for the config's.

        Returns:
            `(..., D)`.
        """
        tokens = hidden_states.flatten(0, -2)  # (N, D)
        image_mask = None if image_mask is None else image_mask.flatten()  # (N,)
        routing = self.gate(tokens, image_mask, num_experts_per_tok)
        experts = routing.experts
        if self.skips_visits and self.experts.num_experts < self.gate.num_experts:
            # Experts spread over ranks: what sends tokens to them knows existing ids only; the weight is 0.
            experts = experts.clamp(max=self.gate.num_experts - 1)
        output = self.experts(tokens, experts, routing.weights).reshape(hidden_states.shape)
        if self.shared_expert is None:
            return output
        shared, mix = self.shared_output(hidden_states), self.shared_expert_mix
        return output + shared if mix is None else (1.0 - mix) * output + mix * shared

    def shared_output(self, hidden_states):
        """The shared expert's output, `(..., D)`; behind a sigmoid gate as in Qwen2-MoE (arXiv:2407.10671)."""
        output = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            output = torch.sigmoid(self.shared_expert_gate(hidden_states)) * output
        return output
