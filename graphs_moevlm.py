# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The experts' arithmetic for captured graphs (torch.compile, torch.export) and for CUDA.

Either no shape depends on the routing, or an operator hides it. Shapes and arguments as in `kernels_moevlm.py`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernels_moevlm import (
    MOST_SPARE_ROWS,
    activation,
    combine,
    decode_experts,
    forward_experts,
    grouped_backward,
    product_dtype,
    rounding_pays,
    sort_visits,
    visit_experts,
)


def batched_experts(tokens, experts, weights, gate_up, down, act):
    """One product a visit on a copy of its expert's weights: for few tokens in a captured graph."""
    ids = experts.flatten().clamp(max=gate_up.shape[0] - 1)  # (N*K,)
    rows = tokens.repeat_interleave(experts.shape[-1], dim=0)  # (N*K, D)
    gate, up = torch.bmm(gate_up[ids], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)  # (N*K, F) both
    outputs = torch.bmm(down[ids], (act(gate) * up).unsqueeze(-1)).squeeze(-1)  # (N*K, D)
    weights = weights.masked_fill(experts >= gate_up.shape[0], 0.0)
    return (outputs.unflatten(0, experts.shape) * weights.unsqueeze(-1)).sum(1).to(tokens.dtype)


def dense_experts(tokens, experts, weights, gate_up, down, act):
    """Every expert on every token, weighted by 0 where it was not chosen: E/K times the work, and exportable."""
    gate, up = torch.matmul(tokens, gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (E, N, F) both
    outputs = torch.matmul(act(gate) * up, down.transpose(1, 2))  # (E, N, D)
    return sum_over_experts(outputs, experts, weights).to(tokens.dtype)


def sum_over_experts(outputs, experts, weights):
    """What every expert made of every token, `(E, N, D)`, weighted by 0 where it was not chosen: `(N, D)`."""
    num_experts, count, _ = outputs.shape
    shares = weights.new_zeros(count, num_experts + 1).scatter_add(1, experts, weights)[:, :num_experts]
    shares = shares.t().unsqueeze(-1)  # (E, N, 1)
    # What overflowed in an expert that was not chosen (float16) must not become 0 times infinity.
    return (outputs.masked_fill(shares == 0, 0.0) * shares).sum(0)


def fits_grouped_mm(tokens, gate_up, dtypes=(torch.bfloat16,)):
    """Whether PyTorch's grouped matrix product takes these: one of `dtypes`, and rows of whole 16 bytes."""
    dtype = product_dtype(tokens, gate_up)
    if not hasattr(F, "grouped_mm") or dtype not in dtypes:
        return False
    return gate_up.shape[-1] * dtype.itemsize % 16 == 0 and gate_up.shape[1] * dtype.itemsize % 32 == 0


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows `(V, C)`, those of expert e up to `ends[e]`, times its transposed matrix of `(E, R, C)`: `(V, R)`."""
    return F.grouped_mm(rows, matrices.transpose(1, 2), offs=ends)


# What torch.compile knows of the grouped product is bf16; as an operator, without a gradient, it has any dtype.
grouped_product_operator = torch.library.custom_op("moevlm::grouped_product", grouped_product, mutates_args=())


@grouped_product_operator.register_fake
def _(rows, matrices, ends):
    return rows.new_empty(rows.shape[0], matrices.shape[1])


def grouped_mm_experts(tokens, experts, weights, gate_up, down, act, skips=True):
    """PyTorch's own grouped matrix product between a sort and its inverse: no host synchronisation, fit for graphs.

    `skips`: whether `experts` may hold the id E; the product leaves the rows of such visits unwritten.
    """
    num_experts, dtype = gate_up.shape[0], product_dtype(tokens, gate_up)
    ids, order = experts.flatten().sort(stable=True)  # (V,) both
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True, out_int32=True)  # (E,)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    places = places.view_as(experts)  # (N, K)

    def written(rows):
        return rows.masked_fill((ids >= num_experts).unsqueeze(-1), 0.0) if skips else rows

    learns = torch.is_grad_enabled()
    opaque = torch.compiler.is_compiling() and not learns and dtype != torch.bfloat16
    multiply = grouped_product_operator if opaque else grouped_product
    visited = VisitedRows.apply if learns else VisitedRows.of
    summed = WeightedSum.apply if learns else WeightedSum.of
    rows = written(visited(tokens.to(dtype), order // experts.shape[-1], places))  # (V, D)
    gate, up = written(multiply(rows, gate_up.to(dtype), ends)).chunk(2, dim=-1)  # (V, F)
    rows = written(multiply(act(gate) * up, down.to(dtype), ends))  # (V, D)
    return summed(rows, weights.to(dtype), order, places).to(tokens.dtype)


class VisitedRows(torch.autograd.Function):
    """The token's row for each sorted visit; its gradient is a sum of K rows a token, not a scatter of V."""

    @staticmethod
    def of(tokens, token, places):
        """`(N, D)`, `(V,)` and `(N, K)` -> `(V, D)`."""
        return tokens.index_select(0, token)

    @staticmethod
    def forward(ctx, tokens, token, places):
        ctx.save_for_backward(places)
        return VisitedRows.of(tokens, token, places)

    @staticmethod
    def backward(ctx, grad_rows):
        (places,) = ctx.saved_tensors
        return F.embedding_bag(places, grad_rows.contiguous(), mode="sum"), None, None


class WeightedSum(torch.autograd.Function):
    """Each token's weighted sum of its K visits' rows, in one pass over the rows forward and in two backward."""

    @staticmethod
    def of(rows, weights, order, places):
        """`(V, D)`, `(N, K)`, `(V,)` and `(N, K)` -> `(N, D)`."""
        return F.embedding_bag(places, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    def forward(ctx, rows, weights, order, places):
        ctx.save_for_backward(rows, weights, order, places)
        return WeightedSum.of(rows, weights, order, places)

    @staticmethod
    def backward(ctx, grad_output):
        rows, weights, order, places = ctx.saved_tensors
        grad = grad_output.index_select(0, order // weights.shape[-1])  # (V, D)
        grad_weights = (rows * grad).sum(-1)[places]
        return grad * weights.flatten()[order].unsqueeze(-1), grad_weights, None, None


# Operators, so that torch.compile sees one node where shapes depend on the routing. A second copy of this file (code of
# another checkpoint) registers them anew.


@torch.library.custom_op("moevlm::experts", mutates_args=())
def experts_operator(
    tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str, dtype: torch.dtype
) -> Tensor:
    if dtype == gate_up.dtype:
        return decode_experts(tokens, experts, weights, gate_up, down, activation(act))
    return forward_experts(tokens, experts, weights, gate_up, down, activation(act), dtype)


@torch.library.custom_op("moevlm::experts_forward", mutates_args=())
def experts_forward_operator(
    tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    visits = sort_visits(experts, gate_up.shape[0], rounding_pays(tokens, dtype))
    hidden = tokens.new_empty(most_rows(tokens, experts, gate_up, dtype), gate_up.shape[1], dtype=dtype)
    outputs = visit_experts(tokens, visits, gate_up, down, activation(act), dtype, hidden)
    return combine(outputs, visits, weights.to(outputs.dtype)), hidden


@torch.library.custom_op("moevlm::experts_backward", mutates_args=())
def experts_backward_operator(
    grad_output: Tensor,
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    visits = sort_visits(experts, gate_up.shape[0], rounding_pays(tokens, hidden.dtype))
    hidden = hidden[: len(visits.tokens)]  # (R, 2F)
    return grouped_backward(grad_output, tokens, visits, weights, gate_up, down, hidden, activation(act))


@experts_operator.register_fake
def _(tokens, experts, weights, gate_up, down, act, dtype):
    return torch.empty_like(tokens)


@experts_forward_operator.register_fake
def _(tokens, experts, weights, gate_up, down, act, dtype):
    rows = most_rows(tokens, experts, gate_up, dtype)
    return torch.empty_like(tokens), tokens.new_empty(rows, gate_up.shape[1], dtype=dtype)


def most_rows(tokens, experts, gate_up, dtype):
    """What no routing of `experts` exceeds in rows: a graph has to know the memory before it knows the routing."""
    return experts.numel() + (gate_up.shape[0] * MOST_SPARE_ROWS if rounding_pays(tokens, dtype) else 0)


@experts_backward_operator.register_fake
def _(grad_output, tokens, experts, weights, gate_up, down, hidden, act):
    return tuple(torch.empty_like(each) for each in (tokens, weights, gate_up, down))


def _keep_for_backward(ctx, inputs, output):
    tokens, experts, weights, gate_up, down, ctx.act, _ = inputs
    ctx.save_for_backward(tokens, experts, weights, gate_up, down, output[1])


def _operator_backward(ctx, grad_output, _):
    tokens, weights, gate_up, down = experts_backward_operator(grad_output.contiguous(), *ctx.saved_tensors, ctx.act)
    return tokens, None, weights, gate_up, down, None, None


experts_forward_operator.register_autograd(_operator_backward, setup_context=_keep_for_backward)


def opaque_experts(tokens, experts, weights, gate_up, down, act):
    """`decode_experts` and `grouped_experts` as one node of a graph; `act` is the activation's name."""
    dtype = product_dtype(tokens, gate_up)
    if torch.is_grad_enabled():
        return experts_forward_operator(tokens, experts, weights, gate_up, down, act, dtype)[0]
    return experts_operator(tokens, experts, weights, gate_up, down, act, dtype)
