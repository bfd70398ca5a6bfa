# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Measuring side by side: interleaved timings, peak memory, shares, tokens a second, the table and the picture of them.

Letters: N tokens, D hidden, E experts.
"""

import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from .kernels_moevlm import product, sort_visits

Row = dict[str, Any]


def wait(device):
    """Wait for the device's work, so that the clock shows it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    cases: Mapping[str, Callable[[int], Any]], seconds: float, device="cpu", renew: Callable[[int], Any] | None = None
) -> dict[str, list[float]]:
    """Times in seconds of each case, all cases once a round in an order drawn anew.

    Args:
        cases: Functions of the round's number, by name; each has run once before the clock starts.
        seconds: How long to go on; three rounds at least.
        device: Where they compute.
        renew: Called with the round's number before each round, off the clock; see [`renewal`].
    """
    order, times = list(cases), {name: [] for name in cases}
    generator = random.Random(0)
    for run in cases.values():
        run(0)
    wait(device)
    end, round_number = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or round_number < 3:
        generator.shuffle(order)
        if renew:
            renew(round_number)
            wait(device)
        for name in order:
            start = time.perf_counter()
            cases[name](round_number)
            wait(device)
            times[name].append(time.perf_counter() - start)
        round_number += 1
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in times.items()}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def batches(tokens, hidden_size, dtype, device):
    """Inputs `(1, N, D)`, several, so that other experts are chosen each round."""
    generator = torch.Generator().manual_seed(tokens)
    count = 32 if tokens < 64 else 8 if tokens < 4096 else 3
    made = [torch.randn(1, tokens, hidden_size, generator=generator) for _ in range(count)]
    return [each.to(device, dtype) for each in made]


def renewal(inputs: list[torch.Tensor]) -> Callable[[int], None]:
    """A function of the round's number that draws that round's member of `inputs` anew.

    As in a training, no two rounds then send the same numbers of rows to the experts: a library that builds a kernel
    for each number of rows pays for it here too.
    """
    generator = torch.Generator().manual_seed(0)

    def renew(round_number):
        place = round_number % len(inputs)
        inputs[place] = torch.randn(inputs[place].shape, generator=generator).to(inputs[place])

    return renew


def forward_case(block, inputs):
    """A function of the round's number that runs `block` on that round's inputs."""

    @torch.no_grad()
    def run(round_number):
        return block(inputs[round_number % len(inputs)])

    return run


def training_case(block, inputs):
    """A function of the round's number: forward, backward with gradients of the inputs too, and gradients dropped."""

    def run(round_number):
        states = inputs[round_number % len(inputs)].detach().requires_grad_()
        output = block(states)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(torch.ones_like(output))
        for parameter in block.parameters():
            parameter.grad = None

    return run


def graph_case(block, inputs):
    """A function of the round's number: one replay of the captured forward (a CUDA graph) on that round's inputs.

    Leaves out what the host does for each kernel, as `torch.compile(mode="reduce-overhead")` would.
    """
    states = inputs[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(stream):
            for _ in range(3):
                block(states)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            block(states)

    def run(round_number):
        states.copy_(inputs[round_number % len(inputs)])
        graph.replay()

    return run


class Ceilings(NamedTuple):
    """What a device reaches at best, measured: [`measured_ceilings`]."""

    bytes_per_second: float  # of a copy, read plus written
    flops_per_second: float  # of a large matrix product


def measured_ceilings(dtype, device, rounds=20) -> Ceilings:
    """[`Ceilings`] of a device: copies of 1 GiB, and products of random 8192 x 8192 matrices, medians of `rounds`."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device=device).to(dtype) for _ in "lr")
    out = torch.empty_like(left)
    copy = interleaved({"": lambda _: target.copy_(source)}, rounds * 1e-3, device)[""]
    multiply = interleaved({"": lambda _: torch.mm(left, right, out=out)}, rounds * 2e-3, device)[""]
    return Ceilings(2 * 2**30 / statistics.median(copy), 2 * 8192**3 / statistics.median(multiply))


def floor(kind, block, inputs, ceilings) -> float:
    """The seconds that no implementation of our sparse `block` can go below on `inputs`, their mean.

    The larger of two times: the operations over the measured rate, and the fewest bytes (each weight of an expert that
    was hit, the states in and out; in training the gradients of all weights too) over the measured bandwidth. A
    backward pass counts twice a forward's operations, and reads the weights once more.
    """
    weights = (block.experts.gate_up_proj, block.experts.down_proj)
    each_expert = sum(weight[0].numel() for weight in weights)
    size, times = inputs[0].element_size(), []
    for states in inputs:
        with torch.no_grad():
            chosen = block.gate(states.flatten(0, -2)).experts  # (N, K)
        operations = 2 * chosen.numel() * each_expert
        read = len(chosen.unique()) * each_expert + block.gate.weight.numel()
        moved = read + 2 * states.numel()
        if kind == "training":
            operations, moved = 3 * operations, moved + read + sum(map(torch.numel, weights)) + 2 * states.numel()
        times.append(max(operations / ceilings.flops_per_second, size * moved / ceilings.bytes_per_second))
    return statistics.fmean(times)


def peak_bytes(run: Callable[[int], Any], device="cpu") -> int:
    """The most memory that `run(0)` holds at a time beyond what was there before, in bytes."""
    run(0)
    if torch.device(device).type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(0)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(0)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def products_case(block, inputs):
    """A function of the round's number: the expert products of our block alone, on rows that lie ready."""
    experts, ready = block.experts, []
    width = experts.intermediate_dim
    with torch.no_grad():
        for states in inputs:
            tokens = states.flatten(0, -2)
            visits = sort_visits(block.gate(tokens).experts, experts.num_experts)
            ready.append((tokens.index_select(0, visits.tokens), list(visits.slices())))

    @torch.no_grad()
    def run(round_number):
        rows, slices = ready[round_number % len(ready)]
        for expert, part in slices:
            both = product(rows[part], experts.gate_up_proj[expert], exact=False)
            activated = experts.act_fn(both[:, :width]).mul_(both[:, width:])
            product(activated, experts.down_proj[expert], exact=False)

    return run


def decoding_case(model, batch_size, new_tokens, compiled):
    """A function of the round's number that decodes `new_tokens` greedily after a prompt of 16 random tokens."""
    prompt = torch.randint(10, 500, (batch_size, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None  # all decode as many tokens, and none looks for an end
    if compiled:
        config = transformers.CompileConfig(fullgraph=True, mode="default")
        config._compile_all_devices = True
        options.update(cache_implementation="static", compile_config=config)

    @torch.no_grad()
    def run(round_number):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    return run


def summary(rows: Sequence[Row], ours: str, limit: str) -> list[Row]:
    """Geometric mean and worst of our time over the fastest peer's, and over the limit's, for each kind and N."""
    found, groups = [], {}
    for row in rows:
        groups.setdefault((row["kind"], row["tokens"]), []).append(row)
    for (kind, tokens), members in groups.items():
        over_peer = [member["values"][ours] / fastest_peer(member, ours, limit)[1] for member in members]
        line = {"kind": kind, "tokens": tokens, "cases": len(members)}
        line.update(over_peer=geometric_mean(over_peer), worst=max(over_peer))
        over_limit = [
            member["values"][ours] / member["values"][limit] for member in members if limit in member["values"]
        ]
        if over_limit:
            line["over_limit"] = geometric_mean(over_limit)
        found.append(line)
    return found


def fastest_peer(row: Row, ours: str, limit: str) -> tuple[str, float]:
    """Name and value of the best that is neither ours nor the limit; for tokens a second, the largest is the best."""
    others = {name: each for name, each in row["values"].items() if not name.startswith(ours) and name != limit}
    best = max if row["unit"] == "tokens/s" else min
    name = best(others, key=others.get)
    return name, others[name]


def table(rows: Sequence[Row], ours: str, limit: str) -> str:
    """A Markdown table, a line a row: each name's value, and ours over the best peer's and over the limit's."""
    lines = []
    for row in rows:
        peer, value = fastest_peer(row, ours, limit)
        cells = [row["kind"], row["dtype"], row["shape"], str(row["tokens"])]
        ratio = f"**{row['values'][ours] / value:.2f}** ({peer})"
        over_limit = f"{row['values'][ours] / row['values'][limit]:.2f}" if limit in row["values"] else "-"
        over_floor = f"{row['values'][ours] / row['floor']:.1f}" if "floor" in row else "-"
        values = ", ".join(f"{name} {shown(each, row['unit'])}" for name, each in row["values"].items())
        lines.append("| " + " | ".join([*cells, ratio, over_limit, over_floor, values]) + " |")
    head = "| kind | dtype | D,F,E,K | tokens | ours / best peer | ours / dense | ours / floor | all |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *lines])


def shown(value: float, unit: str) -> str:
    """A number with its unit, short."""
    if unit == "s":
        return f"{value * 1e6:.0f} us" if value < 1e-2 else f"{value * 1e3:.0f} ms"
    if unit == "bytes":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.0f} {unit}"


def picture(rows: Sequence[Row], ours: str, limit: str, path: Path) -> None:
    """A bar for each row: our value over the best peer's; below 1 we are better (above 1 for tokens a second)."""
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = [row["values"][ours] / fastest_peer(row, ours, limit)[1] for row in rows]
    names = [f"{row['kind']} {row['dtype']} {row['shape']} N={row['tokens']}" for row in rows]
    better = [(ratio > 1) == (row["unit"] == "tokens/s") for ratio, row in zip(ratios, rows)]
    axes.barh(range(len(rows)), ratios, color=["tab:green" if good else "tab:orange" for good in better])
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("ours / best peer (green is better)")
    figure.savefig(path, dpi=120)


def machine(device="cpu") -> Row:
    """What the numbers were measured on."""
    found = {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(device).type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
    return found


def write(results: Row, folder: Path, name: str) -> Path:
    """`<name>.json` in `folder`, and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path
