# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""The experts' arithmetic, tensors in and tensors out: which matrix products run, in which order, on which memory.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, V visits (at most N*K), M visits of one
expert, R rows (V or a few more; also those of a matrix), C columns.

Each `*_experts` function takes `tokens` `(N, D)`, `experts` `(N, K)` (the id E marks a visit to skip), `weights`
`(N, K)`, `gate_up` `(E, 2F, D)`, `down` `(E, D, F)` and the activation `act`, and returns `(N, D)` in the dtype of
`tokens`: SwiGLU experts (Shazeer 2020, arXiv:2002.05202), weighted and summed.
"""

from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import accumulate
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)


@cache
def activation(name):
    """The activation that a config names, one object for each name; its result is new memory, to be written to."""
    known = {"silu": F.silu, "swish": F.silu, "linear": torch.clone}
    return known[name] if name in known else ACT2FN[name]


def eager_experts(tokens, experts, weights, gate_up, down, act):
    """The reference, for reading: one expert after the other, plain autograd."""
    output = torch.zeros_like(tokens)
    # unbind, not weight[e]: each index would build a zero gradient of all E experts.
    for expert, (first, second) in enumerate(zip(gate_up.unbind(0), down.unbind(0))):
        token, choice = torch.where(experts == expert)  # (M,) both
        gate, up = F.linear(tokens[token], first).chunk(2, dim=-1)  # (M, F) both
        visited = F.linear(act(gate) * up, second) * weights[token, choice, None]  # (M, D)
        output = output.index_add(0, token, visited.to(output.dtype))
    return output


# Which product is fast depends on the number of rows and on the CPU


class Cpu(NamedTuple):
    """What the choice of a product depends on."""

    beyond_mkl: bool  # AMD with AVX-512, which MKL does not use there
    native_bfloat16: bool  # PyTorch's own bf16 matrix-vector loop beats oneDNN's, which wants tiles
    slow: tuple[torch.dtype, ...] = ()  # no instructions for products of these: float32's are several times as fast


@cache
def this_cpu():
    """[`Cpu`] of this machine."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = found.get("avx512_bw", False) and not found.get("amx_tile", False)
    slow = []
    if found.get("architecture") == "x86_64" and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn
        slow += [] if onednn._is_mkldnn_bf16_supported() else [torch.bfloat16]
        slow += [] if onednn._is_mkldnn_fp16_supported() else [torch.float16]
    return Cpu("AMD" in found.get("cpu_name", "") and found.get("avx512_f", False), native, tuple(slow))


def matrix_vector(matrices, vectors):
    """Each matrix times its vector, as fast as the memory can deliver the matrices: nothing of them is copied.

    Args:
        matrices: A list of V matrices `(R, C)`.
        vectors: `(V, C)`, or `(1, C)` for all, same dtype.

    Returns:
        `(V, R)`, perhaps strided.
    """
    on_cpu, columns = vectors.device.type == "cpu", vectors.shape[1]
    if on_cpu and this_cpu().beyond_mkl and vectors.dtype == torch.float32 and columns < 4096:
        return paired_matrix_vector(matrices, vectors)
    out = vectors.new_empty(len(matrices), matrices[0].shape[0])
    native = on_cpu and vectors.dtype == torch.bfloat16 and this_cpu().native_bfloat16
    with without_onednn() if native else nullcontext():
        for matrix, vector, place in zip(matrices, vectors.expand(len(matrices), -1).unbind(0), out.unbind(0)):
            torch.mv(matrix, vector, out=place)
    return out


ONEDNN_SWITCH = Lock()


@contextmanager
def without_onednn():
    """PyTorch's own products inside; the switch is the whole process's, so one thread at a time."""
    with ONEDNN_SWITCH:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(enabled)


def paired_matrix_vector(matrices, vectors):
    """[`matrix_vector`] as products of two columns: 1.1 to 2.2 times as fast as MKL's gemv on AMD with AVX-512."""
    rows, columns = matrices[0].shape
    halved = columns >= 2048 and columns % 2 == 0 and matrices[0].is_contiguous()
    if halved:  # two short rows in place of a long one, each with its own half of the vector
        pairs = vectors.unflatten(1, (2, columns // 2))  # (V, 2, C / 2)
        matrices = [matrix.view(2 * rows, columns // 2) for matrix in matrices]
    else:
        pairs = vectors.unsqueeze(1).expand(-1, 2, -1).contiguous()  # (V, 2, C)
    out = vectors.new_empty(len(matrices), matrices[0].shape[0], 2)
    pairs = pairs.transpose(1, 2).unbind(0)
    for matrix, pair, place in zip(matrices, pairs * (len(matrices) // len(pairs)), out.unbind(0)):
        torch.mm(matrix, pair, out=place)
    return out[:, ::2, 0] + out[:, 1::2, 1] if halved else out[..., 0]


def product(rows, matrix, out=None, exact=True):
    """`rows (M, C)` times the transposed `matrix (R, C)`: `(M, R)`, in `out` if given; dtypes may differ (autocast).

    With `exact`, the result does not depend on where the matrix lies in memory, as the forms for few rows do: a model
    that was saved and loaded computes the same bits.
    """
    matrix = matrix.to(rows.dtype)
    found = cpu_product(rows, matrix, exact) if rows.device.type == "cpu" else None
    if found is None:
        if out is None or out.dtype == rows.dtype:
            return torch.mm(rows, matrix.t(), out=out)
        found = torch.mm(rows, matrix.t())
    return found if out is None else out.copy_(found)


FEW_ROWS = 8  # below, a product takes less than making a float32 copy of its matrix


def is_slow(tensor):
    """Whether this CPU has no instructions for products of the dtype."""
    return tensor.device.type == "cpu" and tensor.dtype in this_cpu().slow


def cpu_product(rows, matrix, exact):
    """A faster form than `mm` for this CPU and shape, or None."""
    count, columns = rows.shape
    if count == 1 and not exact:
        return matrix_vector([matrix], rows)
    if is_slow(rows) and count >= FEW_ROWS:
        logger.warning_once(
            f"This CPU has no instructions for products in {rows.dtype}. The experts multiply in float32; all other "
            "layers will take several times as long as in float32: use dtype=torch.float32, and no autocast."
        )
        return (rows.float() @ matrix.float().t()).to(rows.dtype)
    if rows.dtype != torch.float32 or not this_cpu().beyond_mkl:
        return None
    if count <= (8 if columns < 512 else 4 if columns < 1024 else 2) and not exact:
        return (matrix @ rows.contiguous().t()).t()
    if count * matrix.numel() >= 2**25:  # oneDNN's kernel instead of MKL's
        return torch.ops.mkldnn._linear_pointwise(rows, matrix, None, "none", [], "")
    return None


def write_product(left, right, out):
    """`left @ right` written to `out`, whose dtype may differ (autocast)."""
    if is_slow(left) and len(right) >= FEW_ROWS:
        return out.copy_(left.float() @ right.float())
    if left.dtype == right.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(left @ right)


# Sorted by expert


class Visits(NamedTuple):
    """The visits of N tokens as R rows sorted by expert; skipped ones have none."""

    counts: list[int]  # E numbers: how many rows each expert has
    tokens: Tensor  # (R,) the token of each row; 0 for a row that stands for no visit
    places: Tensor  # (N, K) the row of each choice; R where it is skipped

    def slices(self):
        """(expert, its slice of the rows) for each expert that was hit."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def sort_visits(experts, num_experts, rounded=False):
    """[`Visits`] of `experts` `(N, K)`: one stable sort, whatever the number of experts.

    With `rounded`, each expert has as many rows as [`rounded_rows`] says, the last of them without a visit.
    """
    ids = experts.flatten()  # (N*K,)
    order = ids.argsort(stable=True)
    visits = torch.bincount(ids, minlength=num_experts + 1).tolist()[:num_experts]
    counts = [rounded_rows(count) for count in visits] if rounded else visits
    ranks, rows = torch.arange(len(ids), device=ids.device), sum(counts)
    places = ranks
    if counts != visits:
        spare = accumulate((count - visit for count, visit in zip(counts, visits)), initial=0)
        places = ranks + torch.tensor(list(spare), device=ids.device)[ids[order]]
    places = torch.empty_like(order).scatter_(0, order, places).clamp_(max=rows)
    tokens = order.new_zeros(rows + 1).scatter_(0, places, ranks // experts.shape[-1])[:rows]
    return Visits(counts, tokens, places.view_as(experts))


MOST_SPARE_ROWS = 63  # that `rounded_rows` adds to an expert


def rounded_rows(count):
    """How many rows to multiply where `count` are wanted, so that few numbers occur.

    In bf16 oneDNN builds a kernel for each number of rows that it has not met among its last thousand products, which
    takes longer than a small product; beyond 16 rows it works in blocks anyway.
    """
    step = 1 if count <= 16 else 32 if count <= 256 else 64
    return -(-count // step) * step


def rounding_pays(tokens, dtype):
    """Whether products of this dtype are oneDNN's, see [`rounded_rows`]."""
    return tokens.device.type == "cpu" and dtype != torch.float32 and dtype not in this_cpu().slow


def new_rows(visits, like):
    """Memory for the rows `(R, D)`, and one of zeros behind them for the choices that are skipped."""
    rows = like.new_empty(len(visits.tokens) + 1, like.shape[-1])
    rows[-1].zero_()
    return rows


def combine(rows, visits, weights=None):
    """Each token's sum `(N, D)` of its visits' `rows`, weighted by `weights` `(N, K)` if given, in one pass."""
    return F.embedding_bag(visits.places, rows, per_sample_weights=weights, mode="sum")


def visit_experts(tokens, visits, gate_up, down, act, dtype, hidden=None):
    """What the experts make of each row, `(R + 1, D)` in the dtype of `tokens`, not yet weighted; the last is zero.

    `hidden`, if given, `(R, 2F)`, keeps the products with `gate_up` for a backward pass.
    """
    width, decoding = down.shape[-1], hidden is None
    rows = tokens.index_select(0, visits.tokens).to(dtype)  # (R, D)
    outputs = new_rows(visits, tokens)
    if decoding and one_call_pays(rows, visits.counts, gate_up, down):
        ends = torch.tensor(list(accumulate(visits.counts)), dtype=torch.int32)  # (E,)
        both = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)  # (R, 2F)
        activated = act(both[:, :width]).mul_(both[:, width:])  # (R, F)
        outputs[:-1] = F.grouped_mm(activated, down.transpose(1, 2), offs=ends)
        return outputs
    for expert, part in visits.slices():
        both = product(rows[part], gate_up[expert], None if decoding else hidden[part], not decoding)  # (M, 2F)
        activated = act(both[:, :width]).mul_(both[:, width:])  # (M, F)
        product(activated, down[expert], outputs[part], not decoding)
    return outputs


def one_call_pays(rows, counts, gate_up, down):
    """Whether PyTorch's grouped product, a loop over the experts in C++, beats ours in Python.

    It does for few rows an expert. Many are better kept in the caches between their two products, and a single one is
    better multiplied as a vector where that has a fast form.
    """
    fits = rows.dtype != torch.float64 and all(side.shape[2] * rows.itemsize % 16 == 0 for side in (gate_up, down))
    if not (hasattr(F, "grouped_mm") and rows.device.type == "cpu" and rows.dtype == gate_up.dtype and fits):
        return False
    hit = len(counts) - counts.count(0)
    if is_slow(rows):
        return hit > 1 and max(counts) < FEW_ROWS
    least = 1 if rows.dtype == torch.float32 else 2
    return not this_cpu().beyond_mkl and least * hit <= len(rows) <= 128 * hit and hit > 1


def activation_backward(gate, grad, act, out):
    """The gradient of `gate`, given the one of `act(gate)`, written to `out`."""
    if act is F.silu:
        return torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        return out.copy_(torch.autograd.grad(act(leaf), leaf, grad)[0])


def grouped_backward(grad_output, tokens, visits, weights, gate_up, down, hidden, act, needs=(True,) * 4):
    """Gradients of `tokens`, `weights`, `gate_up` and `down`, None for those that `needs` does not name.

    Args:
        grad_output: `(N, D)`.
        hidden: What [`visit_experts`] kept, `(R, 2F)`; its dtype is the products'.
    """
    needs_tokens, needs_weights, needs_gate_up, needs_down = needs
    dtype, width = hidden.dtype, down.shape[-1]
    choices, rows = visits.places.flatten(), len(visits.tokens)
    # A row without a visit has the share 0, so that it adds nothing to a gradient.
    shares = weights.new_zeros(rows + 1).scatter_(0, choices, weights.flatten()).to(dtype).unsqueeze(-1)  # (R + 1, 1)
    grad_shares = hidden.new_zeros(rows + 1)
    grad_inputs = new_rows(visits, tokens) if needs_tokens else None
    grad_gate_up = empty_gradient(gate_up, visits.counts) if needs_gate_up else None
    grad_down = empty_gradient(down, visits.counts) if needs_down else None
    for expert, part in visits.slices():
        token, share = visits.tokens[part], shares[part]
        gate, up = hidden[part].split(width, dim=-1)  # (M, F) both
        acted = act(gate)
        activated = acted * up
        # The weight of a visit is applied to rows of width D, where it is cheapest, and after the product.
        grad_rows = grad_output.index_select(0, token).to(dtype)  # (M, D)
        grad_activated = product(grad_rows, down[expert].t())  # (M, F)
        if needs_down:
            write_product(grad_rows.mul_(share).t(), activated, grad_down[expert])
        # The router's gradient is <dy, W2 a> = <dy W2, a>: no output of an expert has to be kept.
        torch.sum(activated.mul_(grad_activated), -1, out=grad_shares[part])
        grad_both = hidden.new_empty(hidden[part].shape)  # (M, 2F)
        torch.mul(grad_activated, acted, out=grad_both[:, width:])
        activation_backward(gate, grad_activated.mul_(up), act, grad_both[:, :width])
        if needs_gate_up:
            write_product(grad_both.t(), tokens.index_select(0, token).to(dtype).mul_(share), grad_gate_up[expert])
        if needs_tokens:
            product(grad_both, gate_up[expert].t(), grad_inputs[part])
    grad_tokens = combine(grad_inputs, visits, weights.to(tokens.dtype)) if needs_tokens else None
    grad_weights = grad_shares[choices].to(weights.dtype).view_as(weights) if needs_weights else None
    return grad_tokens, grad_weights, grad_gate_up, grad_down


class GroupedExperts(torch.autograd.Function):
    """Forward and backward over contiguous slices; keeps tokens, routing and the products with `gate_up`, no more."""

    @staticmethod
    def forward(ctx, tokens, weights, gate_up, down, experts, act, dtype):
        visits = sort_visits(experts, gate_up.shape[0], rounding_pays(tokens, dtype))
        hidden = tokens.new_empty(len(visits.tokens), gate_up.shape[1], dtype=dtype)  # (R, 2F)
        outputs = visit_experts(tokens, visits, gate_up, down, act, dtype, hidden)
        ctx.save_for_backward(tokens, weights, gate_up, down, hidden, *visits[1:])
        ctx.counts, ctx.act = visits.counts, act
        return combine(outputs, visits, weights.to(outputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tokens, weights, gate_up, down, hidden, *sorted_visits = ctx.saved_tensors
        visits = Visits(ctx.counts, *sorted_visits)
        needs = ctx.needs_input_grad[:4]
        gradients = grouped_backward(grad_output, tokens, visits, weights, gate_up, down, hidden, ctx.act, needs)
        return *gradients, None, None, None


def empty_gradient(parameter, counts):
    """Memory for the gradient of a stacked `parameter`: zero where an expert got no visit, unwritten elsewhere."""
    gradient = torch.empty_like(parameter)
    for expert, count in enumerate(counts):
        if not count:
            gradient[expert].zero_()
    return gradient


def product_dtype(tokens, gate_up):
    """The dtype of the experts' products: autocast's where it is on, else the parameters'."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gate_up.dtype


def grouped_experts(tokens, experts, weights, gate_up, down, act):
    """Sort the visits by expert once, then two products for each expert that was hit, on contiguous slices."""
    device, dtype = tokens.device.type, product_dtype(tokens, gate_up)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if torch.is_grad_enabled() and any(each.requires_grad for each in (tokens, weights, gate_up, down)):
            return GroupedExperts.apply(tokens, weights, gate_up, down, experts, act, dtype)
        return forward_experts(tokens, experts, weights, gate_up, down, act, dtype)


def forward_experts(tokens, experts, weights, gate_up, down, act, dtype):
    """[`grouped_experts`] without a backward pass; `dtype` is the products'."""
    visits = sort_visits(experts, gate_up.shape[0], rounding_pays(tokens, dtype))
    outputs = visit_experts(tokens, visits, gate_up, down, act, dtype)
    return combine(outputs, visits, weights.to(outputs.dtype))


def decode_experts(tokens, experts, weights, gate_up, down, act):
    """One token: a matrix times a vector on views of the chosen experts. Other calls are `grouped_experts`'s."""
    same_dtype = tokens.dtype == gate_up.dtype == product_dtype(tokens, gate_up)
    if len(tokens) != 1 or torch.is_grad_enabled() or not same_dtype:
        return grouped_experts(tokens, experts, weights, gate_up, down, act)
    chosen = experts[0].tolist()
    if max(chosen) >= gate_up.shape[0]:
        kept = [place for place, expert in enumerate(chosen) if expert < gate_up.shape[0]]
        if not kept:
            return torch.zeros_like(tokens)
        chosen, weights = [chosen[place] for place in kept], weights[:, kept]
    hidden = matrix_vector([gate_up[expert] for expert in chosen], tokens)  # (K, 2F)
    gate, up = hidden.chunk(2, dim=-1)
    activated = act(gate).mul_(up).mul_(weights.t())  # (K, F)
    return matrix_vector([down[expert] for expert in chosen], activated).sum(0, keepdim=True)
