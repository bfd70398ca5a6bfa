"""Every form of the experts' arithmetic against a loop that anyone believes: outputs, gradients, memory, graphs.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width.
"""

from threading import Event, Thread
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from moevlm import experts_moevlm
from moevlm import kernels_moevlm as kernels
from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.benchmarking_moevlm import peak_bytes
from moevlm.configuration_moevlm import MoeVlmTextConfig
from moevlm.experts_moevlm import MoeVlmSparseBlock
from moevlm.graphs_moevlm import (
    batched_experts,
    dense_experts,
    experts_forward_operator,
    experts_operator,
    grouped_mm_experts,
    grouped_product_operator,
    opaque_experts,
)

NUM_EXPERTS, HIDDEN, WIDTH, TOP_K = 5, 16, 8, 2
# Sums of at most 40 products, in another order: a few float32 roundings.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# bf16 keeps 8 bits: 2^-8 a rounding, and some ten of them behind one another.
BFLOAT16 = {"rtol": 0.05, "atol": 0.05}
TOLERANCES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def opaque(*arguments):
    return opaque_experts(*arguments[:-1], "silu")


FORMS = {
    "eager": kernels.eager_experts,
    "grouped": kernels.grouped_experts,
    "decode": kernels.decode_experts,
    "batched": batched_experts,
    "dense": dense_experts,
    "grouped_mm": grouped_mm_experts,
    "operator": opaque,
}


def dumb_experts(tokens, experts, weights, gate_up, down, act):
    """Each visit alone, as the formula reads."""
    outputs, connected = [], 0.0 * (gate_up.sum() + down.sum() + weights.sum())
    for token, chosen, shares in zip(tokens, experts, weights):
        output = token * connected
        for expert, share in zip(chosen.tolist(), shares):
            if expert < gate_up.shape[0]:
                gate, up = (gate_up[expert] @ token).chunk(2)
                output = output + share * (down[expert] @ (act(gate) * up))
        outputs.append(output)
    return torch.stack(outputs) if outputs else tokens * connected


def visits(tokens, dtype=torch.float32, experts=None):
    """(tokens, experts, weights, gate_up, down): random, expert 4 chosen by nobody."""
    if experts is None:
        experts = torch.stack([torch.randperm(NUM_EXPERTS - 1)[:TOP_K] for _ in range(tokens)] or [torch.zeros(2)])
        experts = experts[:tokens].long()
    made = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
    made += torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN) * 0.3, torch.randn(NUM_EXPERTS, HIDDEN, WIDTH) * 0.3
    states, weights, gate_up, down = (each.to(dtype).requires_grad_() for each in made)
    return states, experts, weights, gate_up, down


def outputs_and_gradients(form, inputs, act=F.silu):
    """The output without gradients, the one with them, and the gradients of tokens, weights and parameters."""
    inputs = [each.detach().clone().requires_grad_(each.requires_grad) for each in inputs]
    with torch.no_grad():
        alone = form(*inputs, act)
    output = form(*inputs, act)
    # No symmetric sum, which would hide a swap.
    factors = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output.float() * factors).sum().backward()
    return [alone, output, *(each.grad for each in inputs if each.requires_grad)]


def assert_same(found, expected, **tolerance):
    names = ("without gradients", "output", "tokens", "weights", "gate_up", "down")
    for name, one, other in zip(names, found, expected):
        torch.testing.assert_close(one, other, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_the_dumb_loop_in_outputs_and_every_gradient(form, tokens, dtype):
    if form == "grouped_mm" and (dtype == torch.float32 or tokens == 0):
        pytest.skip("PyTorch's grouped product is for bf16 rows in graphs and on CUDA")
    inputs = visits(tokens, dtype)
    expected = outputs_and_gradients(dumb_experts, inputs)
    assert_same(outputs_and_gradients(FORMS[form], inputs), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("experts", [[[0, 5]], [[5, 0]], [[5, 5]], [[5, 3], [5, 5], [2, 1]]])
def test_a_form_skips_the_id_num_experts(form, experts):
    dtype = torch.bfloat16 if form == "grouped_mm" else torch.float32
    inputs = visits(len(experts), dtype, torch.tensor(experts))
    expected = outputs_and_gradients(dumb_experts, inputs)
    assert_same(outputs_and_gradients(FORMS[form], inputs), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_nobody_visits_gets_a_gradient_of_zeros(form):
    dtype = torch.bfloat16 if form == "grouped_mm" else torch.float32
    *_, gate_up, down = outputs_and_gradients(FORMS[form], visits(20, dtype))
    for grad in (gate_up, down):
        assert grad.shape[0] == NUM_EXPERTS and torch.count_nonzero(grad[4]) == 0
        assert torch.count_nonzero(grad[:4].flatten(1).sum(1)) == 4


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_overflows_in_an_expert_that_nobody_visits_harms_no_token(form):
    routed = visits(7, torch.bfloat16 if form == "grouped_mm" else torch.float32)
    routed[3][4], routed[4][4] = 1e30, 1e30
    expected = dumb_experts(*routed, F.silu)
    torch.testing.assert_close(FORMS[form](*routed, F.silu), expected, **TOLERANCES[expected.dtype])


@pytest.mark.parametrize("form", ["grouped", "operator"])
def test_a_token_that_visits_one_expert_twice_counts_both(form):
    inputs = visits(3, experts=torch.tensor([[1, 1], [0, 1], [2, 2]]))
    assert_same(outputs_and_gradients(FORMS[form], inputs), outputs_and_gradients(dumb_experts, inputs), **FLOAT32)


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "linear"])
@pytest.mark.parametrize("form", ["grouped", "dense", "batched"])
def test_other_activations_have_their_own_gradient(form, name):
    inputs, act = visits(9), kernels.activation(name)
    expected = outputs_and_gradients(dumb_experts, inputs, act)
    assert_same(outputs_and_gradients(FORMS[form], inputs, act), expected, **FLOAT32)


@pytest.mark.parametrize("form", ["eager", "grouped", "decode", "batched", "dense"])
def test_double_precision_is_taken_with_and_without_gradients(form, monkeypatch):
    monkeypatch.setattr(kernels, "this_cpu", lambda: kernels.Cpu(False, True))
    inputs = visits(9, torch.float64)
    expected = outputs_and_gradients(dumb_experts, inputs)
    assert_same(outputs_and_gradients(FORMS[form], inputs), expected, rtol=1e-9, atol=1e-9)


def test_frozen_parts_get_no_gradient_and_the_others_theirs():
    inputs = visits(9)
    expected = outputs_and_gradients(kernels.eager_experts, inputs)
    for frozen in (0, 2, 3, 4):
        parts = [each.detach().requires_grad_(index not in (1, frozen)) for index, each in enumerate(inputs)]
        kernels.grouped_experts(*parts, F.silu).mul(torch.linspace(-1, 1, 9 * HIDDEN).view(9, HIDDEN)).sum().backward()
        assert parts[frozen].grad is None
        for index, grad in zip((0, 2, 3, 4), expected[2:]):
            if index != frozen:
                torch.testing.assert_close(parts[index].grad, grad, **FLOAT32)


@pytest.mark.parametrize("form", ["grouped", "decode", "operator"])
@pytest.mark.parametrize("tokens", [1, 12])
def test_autocast_runs_the_products_in_its_dtype_as_eager_does(form, tokens):
    inputs, seen = visits(tokens), []

    def act(gate):
        seen.append(gate.dtype)
        return F.silu(gate)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs_and_gradients(kernels.eager_experts, inputs)
        found = outputs_and_gradients(FORMS[form], inputs, act)
    assert {each.dtype for each in found} == {torch.float32}
    assert form == "operator" or set(seen) == {torch.bfloat16}
    assert_same(found, expected, **BFLOAT16)


def test_a_second_derivative_is_refused_by_name():
    tokens, *others = visits(4)
    (grad,) = torch.autograd.grad(
        kernels.grouped_experts(tokens, *others, F.silu).square().sum(), tokens, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_forward_keeps_the_hidden_products_and_the_routing_only():
    inputs, kept = visits(40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        kernels.grouped_experts(*inputs, F.silu)
    visited = 40 * TOP_K
    parameters = sum(each.numel() for each in inputs if each.requires_grad)
    assert sum(kept) == parameters + visited * 2 * WIDTH + 2 * visited


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_copies_no_expert(dtype):
    tokens, experts, weights = torch.randn(1, 256).to(dtype), torch.tensor([[3, 1]]), torch.rand(1, 2).to(dtype)
    gate_up, down = torch.randn(4, 512, 256).to(dtype), torch.randn(4, 256, 256).to(dtype)
    used = peak_bytes(lambda _: kernels.decode_experts(tokens, experts, weights, gate_up, down, F.silu))
    assert 0 < used < down[0].nbytes / 4


CPUS = [kernels.Cpu(beyond_mkl, native) for beyond_mkl in (True, False) for native in (True, False)]
WITHOUT_BF16 = kernels.Cpu(False, False, (torch.bfloat16,))


@torch.no_grad()
@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [24, 600, 1100, 2050, 4100])
def test_a_matrix_times_a_vector_is_right_on_every_cpu(monkeypatch, cpu, dtype, columns):
    monkeypatch.setattr(kernels, "this_cpu", lambda: cpu)
    matrices, vectors = torch.randn(3, 10, columns).to(dtype), torch.randn(3, columns).to(dtype)
    expected = torch.einsum("vrc,vc->vr", matrices.double(), vectors.double()).to(dtype)
    found = kernels.matrix_vector(list(matrices), vectors)
    # Sums of 4100 products of size 1 are of size 64.
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1.0 if dtype == torch.bfloat16 else 1e-3)
    assert torch._C._get_mkldnn_enabled()


def test_two_threads_do_not_leave_the_switch_of_onednn_off():
    inside = Event()

    def second():
        with kernels.without_onednn():
            inside.set()

    with kernels.without_onednn():
        thread = Thread(target=second)
        thread.start()
        assert not inside.wait(0.1)
    thread.join()
    assert inside.is_set() and torch._C._get_mkldnn_enabled()


@torch.no_grad()
@pytest.mark.parametrize("cpu", CPUS[:2])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 64, 48), (2, 64, 48), (4, 600, 48), (2, 1100, 8), (64, 1024, 512)]
)
def test_a_product_is_right_in_every_form(monkeypatch, cpu, exact, count, columns, rows):
    monkeypatch.setattr(kernels, "this_cpu", lambda: cpu)
    states, matrix = torch.randn(count, columns), torch.randn(rows, columns)
    expected = (states.double() @ matrix.double().t()).float()
    out = torch.empty(count, rows)
    torch.testing.assert_close(kernels.product(states, matrix, exact=exact), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kernels.product(states, matrix, out, exact), expected, rtol=1e-3, atol=1e-3)
    turned = kernels.product(states, matrix.t().contiguous().t(), exact=exact)
    torch.testing.assert_close(turned, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("count, rounded_once", [(7, False), (8, True)])
def test_a_cpu_without_bf16_multiplies_many_rows_in_float32(monkeypatch, count, rounded_once):
    monkeypatch.setattr(kernels, "this_cpu", lambda: WITHOUT_BF16)
    plain, warned = Mock(wraps=torch.mm), Mock()
    monkeypatch.setattr(torch, "mm", plain)
    monkeypatch.setattr(kernels.logger, "warning_once", warned)
    rows, matrix = torch.randn(count, 300).bfloat16(), torch.randn(40, 300).bfloat16()
    found, out = kernels.product(rows, matrix), torch.empty(count, 40, dtype=torch.bfloat16)
    once = (rows.float() @ matrix.float().t()).bfloat16()
    assert torch.equal(found, once) or not rounded_once
    assert torch.equal(kernels.product(rows, matrix, out), found) and torch.equal(out, found)
    grads, gradient = torch.randn(count, 40).bfloat16(), torch.empty(40, 300, dtype=torch.bfloat16)
    kernels.write_product(grads.t(), rows, gradient)
    assert torch.equal(gradient, (grads.t().float() @ rows.float()).bfloat16()) or not rounded_once
    torch.testing.assert_close(found, once, rtol=1e-2, atol=0.1)
    assert plain.called != rounded_once and warned.called == rounded_once


@pytest.mark.parametrize("counts, pays", [([7, 0, 3], True), ([8, 0, 3], False), ([7, 0, 0], False)])
def test_a_cpu_without_bf16_takes_the_grouped_product_for_few_rows_only(monkeypatch, counts, pays):
    monkeypatch.setattr(kernels, "this_cpu", lambda: WITHOUT_BF16)
    rows, gate_up, down = (torch.zeros(*shape).bfloat16() for shape in ((sum(counts), 16), (3, 32, 16), (3, 16, 16)))
    assert kernels.one_call_pays(rows, counts, gate_up, down) == pays


def test_the_sort_of_visits_is_stable_and_complete():
    experts = torch.tensor([[2, 0], [0, 3], [3, 2]])  # 3 is the id to skip
    found = kernels.sort_visits(experts, 3)
    assert found.counts == [2, 0, 2]
    assert found.tokens.tolist() == [0, 1, 0, 2]
    assert found.places.tolist() == [[2, 0], [1, 4], [4, 3]]
    assert list(found.slices()) == [(0, slice(0, 2)), (2, slice(2, 4))]


def test_rounded_rows_keep_the_order_and_point_the_spare_ones_at_the_first_token():
    experts = torch.tensor([[0, 1]] * 20 + [[2, 1]] * 3 + [[3, 0]])  # 3 is the id to skip
    found, plain = kernels.sort_visits(experts, 3, rounded=True), kernels.sort_visits(experts, 3)
    assert plain.counts == [21, 23, 3] and found.counts == [32, 32, 3]
    starts = [0, 32, 64]
    for start, count, (_, part) in zip(starts, plain.counts, plain.slices()):
        assert torch.equal(found.tokens[start : start + count], plain.tokens[part])
        assert found.tokens[start + count : start + 32].count_nonzero() == 0
    assert found.places[0].tolist() == [0, 32] and found.places[-1].tolist() == [67, 20]
    assert [kernels.rounded_rows(count) for count in (0, 1, 16, 17, 256, 257, 1000)] == [0, 1, 16, 32, 256, 320, 1024]


@pytest.mark.parametrize("cpu", [CPUS[-1], WITHOUT_BF16])
def test_an_expert_with_spare_rows_or_float32_products_has_the_same_gradients(monkeypatch, cpu):
    monkeypatch.setattr(kernels, "this_cpu", lambda: cpu)
    inputs = visits(90, torch.bfloat16)  # up to 60 visits an expert
    assert kernels.rounding_pays(inputs[0], torch.bfloat16) == (cpu is not WITHOUT_BF16)
    assert_same(
        outputs_and_gradients(kernels.grouped_experts, inputs),
        outputs_and_gradients(kernels.eager_experts, inputs),
        **BFLOAT16,
    )


@pytest.mark.parametrize("operator", [experts_operator, experts_forward_operator])
def test_the_operators_keep_what_torch_compile_asks_of_them(operator):
    inputs = visits(6)
    if operator is experts_operator:  # for calls without gradients
        inputs = [each.detach() for each in inputs]
    torch.library.opcheck(operator, (*inputs, "silu", torch.float32))


def test_the_grouped_product_keeps_what_torch_compile_asks_of_it():
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    torch.library.opcheck(grouped_product_operator, (torch.randn(7, 16), torch.randn(3, 8, 16), ends))


def sparse_block(implementation, dtype=torch.float32, **fields):
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = MoeVlmTextConfig(**sizes, num_experts=4, moe_intermediate_size=8, **fields)
    config._experts_implementation = implementation
    block = MoeVlmSparseBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.to(dtype)


@pytest.mark.parametrize("implementation", ["auto", "grouped", "decode", "dense", "batched_mm"])
def test_a_compiled_block_is_one_graph_and_equals_the_block(implementation):
    torch.compiler.reset()
    block = sparse_block(implementation)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (1, 9):
        states = torch.randn(tokens, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(states), block(states), **FLOAT32)
    expected = torch.autograd.grad(block(states).square().sum(), list(block.parameters()))
    found = torch.autograd.grad(compiled(states).square().sum(), list(block.parameters()))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **FLOAT32)


def compiled_once(block, states):
    """The output of the block as one graph, and that graph's code."""
    torch.compiler.reset()
    codes = []

    def keep(graph, inputs):
        codes.append(graph.code)
        return graph

    return torch.compile(block, fullgraph=True, backend=keep)(states), codes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [None, 0.5])
@pytest.mark.parametrize("copied_bytes, product", [(0, "grouped"), (experts_moevlm.COPIED_BYTES, "bmm")])
def test_a_compiled_block_fuses_few_tokens_and_skips_their_spared_visits(
    monkeypatch, copied_bytes, product, dtype, top_p
):
    monkeypatch.setattr(experts_moevlm, "ONE_CALL", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(experts_moevlm, "COPIED_BYTES", copied_bytes)
    block = sparse_block("auto", dtype, num_experts_per_tok=3, router_top_p=top_p)
    states = torch.randn(9, 16, dtype=dtype)
    close = FLOAT32 if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}  # as below
    with torch.no_grad():
        found, code = compiled_once(block, states)
        torch.testing.assert_close(found, block(states), **close)
    assert product in code and "moevlm.experts" not in code


def test_a_compiled_block_under_autocast_casts_the_visited_experts_only():
    block, states = sparse_block("auto"), torch.randn(9, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, code = compiled_once(block, states)
        torch.testing.assert_close(found, block(states), rtol=0.05, atol=0.3)
    assert "moevlm.experts" in code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_block_takes_any_number_of_tokens_and_needs_no_code_of_ours(dtype):
    block = sparse_block("auto", dtype)
    with torch.no_grad():
        exported = torch.export.export(
            block, (torch.randn(6, 16, dtype=dtype),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},)
        )
        names = {str(node.target) for node in exported.graph.nodes}
        assert not any("moevlm" in name for name in names)
        assert any("grouped_mm" in name for name in names) == (dtype == torch.bfloat16)
        for tokens in (2, 11):
            states = torch.randn(tokens, 16, dtype=dtype)
            # bf16: outputs of size up to 20, each rounded a dozen times.
            close = FLOAT32 if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
            torch.testing.assert_close(exported.module()(states), block(states), **close)


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="transformers 4.57 has no experts backends")
def test_every_implementation_of_transformers_can_be_chosen():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moevlm.experts_moevlm import IMPLEMENTATIONS

    for name in ALL_EXPERTS_FUNCTIONS.valid_keys():
        assert IMPLEMENTATIONS.get_interface(name, None) is ALL_EXPERTS_FUNCTIONS[name]
