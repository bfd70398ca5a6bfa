"""The benchmark: that it compares equal work, counts right, and writes what it says."""

import json
import sys

import pytest
import torch

import run_benchmark
from moevlm import benchmarking_moevlm as bench
from moevlm.base_moevlm import IS_TRANSFORMERS_5
from moevlm.peers_moevlm import DENSE, OURS, Shape, blocks, contestants, first_tensor, text_stacks

SHAPE = Shape(32, 16, 4, 2)


def row(unit, **values):
    return {"kind": "forward", "dtype": "float32", "shape": "1,1,1,1", "tokens": 1, "unit": unit, "values": values}


@torch.no_grad()
def test_every_peer_computes_what_our_block_does():
    compared = blocks(SHAPE, torch.float32, "cpu", ("auto", "eager"))
    states = torch.randn(1, 24, SHAPE.hidden_size)
    expected = compared[OURS](states)
    assert len(compared) == (6 if IS_TRANSFORMERS_5 else 7)
    for name, block in compared.items():
        if name == DENSE:
            active = SHAPE.top_k * compared[OURS].experts.gate_up_proj[0].numel() * 3 // 2
            assert sum(parameter.numel() for parameter in block.parameters()) == active
        else:
            # Float32 sums of 32 terms.
            torch.testing.assert_close(first_tensor(block.eval()(states)), expected, rtol=1e-4, atol=1e-7)


def test_the_text_stacks_are_one_function():
    models = text_stacks(torch.float32, "cpu")
    assert 21e6 < sum(p.numel() for p in models[OURS].language_model.parameters()) < 23e6 and len(models) > 1
    ids = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        expected = models.pop(OURS)(ids).logits
        for name, model in models.items():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4, msg=name)


def test_who_would_fill_the_memory_or_wait_for_the_host_does_not_take_part():
    names = (OURS, "Qwen3-MoE eager", "Qwen3-MoE batched_mm", "Qwen3-MoE grouped_mm", "Mixtral", DENSE)
    compared, few, many = dict.fromkeys(names), Shape(32, 16, 8, 2), Shape(32, 16, 64, 2)

    def left_out(*how):
        return [name for name in names if name not in contestants(compared, *how)]

    assert left_out("forward", many, 8) == []
    assert left_out("forward", many, 64) == ["Qwen3-MoE batched_mm"] == left_out("growth", many, 1)
    assert left_out("training", few, 512) == ["Qwen3-MoE batched_mm"]
    assert left_out("memory", many, 512) == ["Qwen3-MoE eager", "Qwen3-MoE batched_mm"]
    assert left_out("graph", few, 8) == ["Qwen3-MoE eager", "Mixtral"]


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "8,8,2,3", "0,8,2,1"])
def test_a_wrong_shape_is_refused_with_the_right_form(text):
    with pytest.raises(ValueError, match="D,F,E,K"):
        Shape.parse(text)


def test_the_peak_counts_what_is_held_at_once():
    def run(_):
        first = torch.ones(2**18)
        second = first + 1
        del first
        third = second + 1
        return second, third

    assert bench.peak_bytes(run) == pytest.approx(2 * 2**18 * 4, rel=1e-3)  # the scalars come on top


def test_every_case_runs_once_a_round_and_once_before():
    seen = {"a": [], "b": []}
    times = bench.interleaved({name: calls.append for name, calls in seen.items()}, 0.0)
    assert seen == {"a": [0, 0, 1, 2], "b": [0, 0, 1, 2]}
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


def test_the_best_peer_is_the_fastest_and_never_ours_or_the_limit():
    assert bench.fastest_peer(
        row("s", **{OURS: 1.0, "ours eager": 0.1, "A": 3.0, "B": 2.0, DENSE: 0.5}), OURS, DENSE
    ) == (
        "B",
        2.0,
    )
    assert bench.fastest_peer(row("tokens/s", **{OURS: 1.0, "A": 3.0, "B": 2.0}), OURS, DENSE) == ("A", 3.0)


def test_the_summary_is_the_geometric_mean_and_the_worst():
    rows = [row("s", ours=1.0, A=2.0, dense=1.0), row("s", ours=2.0, A=1.0, dense=1.0)]
    (line,) = bench.summary(rows, OURS, DENSE)
    assert (line["cases"], line["worst"]) == (2, 2.0)
    assert line["over_peer"] == pytest.approx(1.0) and line["over_limit"] == pytest.approx(2**0.5)


def test_our_products_alone_are_less_than_the_block():
    block = blocks(SHAPE, torch.float32, "cpu")[OURS]
    inputs = bench.batches(64, SHAPE.hidden_size, torch.float32, "cpu")
    run = bench.products_case(block, inputs)
    run(0)
    times = bench.medians(bench.interleaved({"all": bench.forward_case(block, inputs), "products": run}, 0.1))
    assert times["products"] < times["all"]


def test_the_command_writes_numbers_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_benchmark, "TRAINED_FROM", 8)
    monkeypatch.setattr(run_benchmark, "GROWTH", ("16,16,4,2", "16,16,8,2"))
    options = "--shapes 16,16,4,2 --tokens 1 8 --seconds 0 --dtype float32 bfloat16 --name small".split()
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *options, "--output_dir", str(tmp_path)])
    run_benchmark.main()
    results = json.loads((tmp_path / "small.json").read_text())
    kinds = [(each["kind"], each["tokens"]) for each in results["rows"] if each["dtype"] == "float32"]
    block = [("forward", 1), ("forward", 8), ("training", 8), ("memory", 8), ("share", 8)]
    assert sorted(kinds) == sorted([*block, ("growth", 1), ("growth", 1)])
    assert all(value > 0 for each in results["rows"] for value in each["values"].values())
    assert results["machine"]["torch"] == torch.__version__ and results["machine"]["threads"] == 1
    assert (tmp_path / "small.png").stat().st_size > 1000
    assert (tmp_path / "small.md").read_text().strip() in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_measures_decoding(tmp_path, monkeypatch):
    options = "--what decoding --compile --new_tokens 2 --batch_sizes 1 2 --seconds 0 --name decoding".split()
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *options, "--output_dir", str(tmp_path)])
    run_benchmark.main()
    rows = json.loads((tmp_path / "decoding.json").read_text())["rows"]
    kinds = ("decoding", "decoding, compiled")
    assert [(each["kind"], each["shape"], each["unit"]) for each in rows] == [
        (kind, shape, "tokens/s") for kind in kinds for _ in (1, 2) for shape in ("text stack", "MoeVlm")
    ]
    # What cannot be compiled takes part as it is, so that on either line there is something to compare with.
    assert all(OURS in each["values"] and len(each["values"]) > 1 for each in rows)
    assert "eager (not compiled)" in rows[-1]["values"]


def test_an_unknown_measurement_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--what", "speed"])
    with pytest.raises(ValueError, match="--what .*speed.* forward, graph, training"):
        run_benchmark.main()


def test_the_floor_counts_each_expert_that_was_hit_once_and_each_operation():
    block, sizes = blocks(SHAPE, torch.float32, "cpu")[OURS], 3 * 32 * 16
    inputs = [torch.randn(1, 24, SHAPE.hidden_size)]
    hit = len(block.gate(inputs[0][0]).experts.unique())
    moved = hit * sizes + 4 * 32 + 2 * 24 * 32
    slow_memory, slow_products = bench.Ceilings(1.0, 1e30), bench.Ceilings(1e30, 1.0)
    assert bench.floor("forward", block, inputs, slow_memory) == 4 * moved
    assert bench.floor("forward", block, inputs, slow_products) == 2 * 24 * 2 * sizes
    assert bench.floor("training", block, inputs, slow_products) == 3 * 2 * 24 * 2 * sizes
    # The weights once more, the gradients of all four experts, and the gradients of the states going in and out.
    again = hit * sizes + 4 * 32 + 4 * sizes + 2 * 24 * 32
    assert bench.floor("training", block, inputs, slow_memory) == 4 * (moved + again)


def test_a_graph_needs_cuda(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--what", "graph"])
    with pytest.raises(ValueError, match="needs a CUDA device, not --device cpu"):
        run_benchmark.main()
