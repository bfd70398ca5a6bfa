"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from conftest import tiny_config
from test_kernels import FORMS, assert_same, outputs_and_gradients, visits

from moevlm import benchmarking_moevlm as bench
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.peers_moevlm import OURS, Shape, blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Of float32 products of some hundred terms; TF32 is off by default.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
# bf16 keeps 8 bits.
ROUGH = {"rtol": 0.05, "atol": 0.05}


def on_cuda(inputs):
    return [each.detach().cuda().requires_grad_(each.requires_grad) for each in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 200])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_equals_eager_on_the_cpu(form, tokens, dtype):
    if form == "grouped_mm" and (dtype == torch.float32 or tokens == 0):
        pytest.skip("PyTorch's grouped product is for bf16 rows")
    if form == "batched" and (dtype, tokens) == (torch.bfloat16, 200):
        pytest.skip("made for few tokens: autograd adds the gradients of its copies in bf16")
    inputs = visits(tokens, dtype)
    expected = outputs_and_gradients(FORMS["eager"], inputs)
    found = [each.cpu() for each in outputs_and_gradients(FORMS[form], on_cuda(inputs))]
    assert_same(found, expected, **(CLOSE if dtype == torch.float32 else ROUGH))


@torch.no_grad()
def test_a_captured_block_computes_what_the_block_does_on_other_tokens():
    block = blocks(Shape(64, 32, 8, 2), torch.bfloat16, "cuda")[OURS]
    inputs = bench.batches(16, 64, torch.bfloat16, "cuda")
    seen = []
    run = bench.graph_case(lambda states: seen.append(block(states)) or seen[-1], inputs)
    run(1)
    torch.testing.assert_close(seen[-1], block(inputs[1]), **ROUGH)


def test_the_whole_model_computes_on_cuda_what_it_does_on_the_cpu(batch):
    model = MoeVlmForConditionalGeneration(tiny_config()).train()
    on_cpu = model(**batch, output_router_logits=True)
    on_cpu.loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    on_gpu = model.cuda()(**{name: each.cuda() for name, each in batch.items()}, output_router_logits=True)
    on_gpu.loss.backward()
    torch.testing.assert_close(on_gpu.logits.cpu(), on_cpu.logits, **CLOSE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), grads[name], **CLOSE, msg=lambda text, name=name: name + text)


@torch.no_grad()
def test_generation_on_cuda_gives_the_tokens_of_the_cpu(tiny, batch):
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    expected = tiny.generate(**inputs, max_new_tokens=8, do_sample=False)
    on_gpu = {name: each.cuda() for name, each in inputs.items()}
    assert torch.equal(tiny.cuda().generate(**on_gpu, max_new_tokens=8, do_sample=False).cpu(), expected)


def test_training_in_bfloat16_by_autocast_runs_the_grouped_product(batch):
    model = MoeVlmForConditionalGeneration(tiny_config()).cuda().train()
    on_gpu = {name: each.cuda() for name, each in batch.items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**on_gpu).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_no_implementation_is_faster_than_the_floor():
    shape = Shape(1024, 512, 32, 4)
    block = blocks(shape, torch.bfloat16, "cuda")[OURS]
    ceilings = bench.measured_ceilings(torch.bfloat16, "cuda")
    assert ceilings.bytes_per_second > 1e11 and ceilings.flops_per_second > 1e13
    inputs = bench.batches(8192, shape.hidden_size, torch.bfloat16, "cuda")
    times = bench.medians(bench.interleaved({"": bench.forward_case(block, inputs)}, 0.2, "cuda"))
    assert times[""] > bench.floor("forward", block, inputs, ceilings)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("tokens", [1, 16, 600])
def test_a_block_in_bfloat16_never_waits_for_the_host(tokens, learns):
    block = blocks(Shape(64, 32, 8, 2), torch.bfloat16, "cuda")[OURS]
    states = torch.randn(1, tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=learns)
    for mode in ("default", "error"):  # the first call may load kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.set_grad_enabled(learns):
                output = block(states)
            if learns:
                output.backward(torch.ones_like(output))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_grouped_product_gives_the_gradients_of_autograd_at_a_real_size():
    block = blocks(Shape(256, 128, 16, 4), torch.bfloat16, "cuda")[OURS]
    found = {}
    for name in ("grouped_mm", "eager"):
        block.experts.config._experts_implementation = name
        states = torch.randn(1, 700, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        states = states.bfloat16().requires_grad_()
        block.zero_grad()
        output = block(states)
        output.backward(torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).bfloat16())
        found[name] = output.detach(), states.grad, block.gate.weight.grad, block.experts.gate_up_proj.grad
    for one, other in zip(*found.values()):
        assert (one.float() - other.float()).norm() < 0.02 * other.float().norm()  # bf16 keeps 8 bits
