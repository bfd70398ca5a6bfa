# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Measure the sparse block and whole models beside those of the installed transformers, in one interleaved run.

    python run_benchmark.py --threads 1 --dtype float32 bfloat16 --what forward training memory growth share
    python run_benchmark.py --what decoding --batch_sizes 1 8 --compile

Writes `<output_dir>/<name>.json`, `.md` and `.png`. Steady figures need a quiet machine: on Linux, put
`chrt -r 1 taskset -c 1` in front.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, logging

from moevlm import benchmarking_moevlm as bench
from moevlm.configuration_moevlm import MoeVlmConfig
from moevlm.memory_moevlm import keep_freed_memory, release_freed_memory
from moevlm.peers_moevlm import DENSE, OURS, Shape, blocks, can_compile, contestants, text_stacks, vlms

SHAPES = ("256,512,8,2", "576,1536,8,2", "1024,512,32,4", "2048,768,64,8")
GROWTH = ("256,256,8,2", "256,256,64,2", "256,256,256,2")
TRAINED_FROM = 512  # tokens; fewer are no training batch
BLOCKS = ("forward", "graph", "training", "memory", "share")


@dataclass
class BenchmarkArguments:
    """What to measure, and where the results go."""

    what: list[str] = field(
        default_factory=lambda: ["forward", "training", "memory", "growth", "share"],
        metadata={"help": "Any of forward, graph (captured; CUDA), training, memory, growth, share, decoding."},
    )
    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": "Blocks, as D,F,E,K."})
    dtype: list[str] = field(default_factory=lambda: ["float32"], metadata={"help": "float32, bfloat16, float16."})
    tokens: list[int] = field(default_factory=lambda: [1, 8, 64, 512, 4096], metadata={"help": "Tokens of a call."})
    implementations: list[str] = field(default_factory=lambda: ["auto"], metadata={"help": "Ours; first is 'ours'."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    threads: int = field(default=1, metadata={"help": "Threads of a product."})
    seconds: float = field(default=3.0, metadata={"help": "Of measuring each case; three rounds at least."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Of decoding."})
    new_tokens: int = field(default=64, metadata={"help": "Decoded by each call."})
    config: Optional[str] = field(
        default=None, metadata={"help": "JSON of a MoeVlm to decode with; default: MoeVlmConfig()."}
    )
    compile: bool = field(default=False, metadata={"help": "Also decode with a static cache and torch.compile."})
    output_dir: str = field(default="benchmarks", metadata={"help": "Folder of the results."})
    name: Optional[str] = field(default=None, metadata={"help": "Of the files; default: device, line and threads."})


def main():
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    check(args)
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    kept = keep_freed_memory()
    plan = list(planned(args))
    rows = [row for step, row_args in tqdm(plan, desc="measuring") for row in step(args, *row_args)]
    machine = {**bench.machine(args.device), "keeps_freed_memory": kept}
    sums = bench.summary(rows, OURS, DENSE)
    name = args.name or f"experts-{args.device}-{machine['transformers']}-{args.threads}-threads"
    folder, text = Path(args.output_dir), bench.table(rows, OURS, DENSE)
    path = bench.write({"machine": machine, "arguments": vars(args), "summary": sums, "rows": rows}, folder, name)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    bench.picture(rows, OURS, DENSE, path.with_suffix(".png"))
    shown = [{k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()} for line in sums]
    print(text, *shown, f"written: {path}, .md, .png", sep="\n")


def check(args):
    """Raise for a measurement that does not exist, or not on this device."""
    known = (*BLOCKS, "growth", "decoding")
    if unknown := set(args.what) - set(known):
        raise ValueError(f"--what {sorted(unknown)} is unknown; take any of {', '.join(known)}")
    if "graph" in args.what and not args.device.startswith("cuda"):
        raise ValueError(f"--what graph needs a CUDA device, not --device {args.device}; leave it out")


def planned(args):
    """(function, its arguments) of each step."""
    for dtype in args.dtype:
        for shape in map(Shape.parse, args.shapes):
            kinds = [kind for kind in args.what if kind in BLOCKS]
            if kinds:
                yield measure_blocks, (dtype, shape, kinds)
        if "growth" in args.what:
            for shape in map(Shape.parse, GROWTH):
                yield measure_blocks, (dtype, shape, ["growth"])
        if "decoding" in args.what:
            for compiled in [False, True] if args.compile else [False]:
                for batch_size in args.batch_sizes:
                    yield measure_decoding, (dtype, batch_size, compiled)


def measure_blocks(args, dtype, shape, kinds):
    """Rows of one shape: for each number of tokens, the kinds that make sense there."""
    dtype_name, dtype = dtype, getattr(torch, dtype)
    compared = blocks(shape, dtype, args.device, tuple(args.implementations))
    ceilings = bench.measured_ceilings(dtype, args.device) if args.device.startswith("cuda") else None
    for tokens in [1] if kinds == ["growth"] else args.tokens:
        inputs = bench.batches(tokens, shape.hidden_size, dtype, args.device)
        labels = {"dtype": dtype_name, "shape": ",".join(map(str, shape)), "tokens": tokens}
        for kind in kinds:
            if kind in ("training", "memory", "share") and tokens < TRAINED_FROM:
                continue
            unit, values = measured(args, kind, contestants(compared, kind, shape, tokens), inputs)
            release_freed_memory()
            row = {"kind": kind, **labels, "unit": unit, "values": values}
            if ceilings and kind in ("forward", "graph", "training"):
                row |= {"floor": bench.floor(kind, compared[OURS], inputs, ceilings), **ceilings._asdict()}
            yield row


def measured(args, kind, compared, inputs):
    """(unit, values by name) of one kind of measurement."""
    if kind == "memory":
        runs = {name: bench.training_case(block, inputs) for name, block in compared.items()}
        return "bytes", {name: bench.peak_bytes(run, args.device) for name, run in runs.items()}
    case = {"training": bench.training_case, "graph": bench.graph_case}.get(kind, bench.forward_case)
    runs = {name: case(block.train(kind == "training"), inputs) for name, block in compared.items()}
    if kind == "share":
        runs = {OURS: runs[OURS], "products alone": bench.products_case(compared[OURS], inputs)}
    renew = bench.renewal(inputs) if kind in ("forward", "training") else None
    return "s", bench.medians(bench.interleaved(runs, args.seconds, args.device, renew))


def measure_decoding(args, dtype, batch_size, compiled):
    """Rows of greedy decoding in tokens a second: the text stack, and a whole MoeVlm."""
    config = MoeVlmConfig.from_json_file(args.config) if args.config else MoeVlmConfig()
    made = getattr(torch, dtype)
    for shape, models in (("text stack", text_stacks(made, args.device)), ("MoeVlm", vlms(config, made, args.device))):
        torch.compiler.reset()  # all models of a class share one limit of compiled forms
        runs = {}
        for name, model in models.items():
            compiles = compiled and can_compile(name)
            shown = name if compiles == compiled else f"{name} (not compiled)"
            runs[shown] = bench.decoding_case(model, batch_size, args.new_tokens, compiles)
        times = bench.medians(bench.interleaved(runs, args.seconds, args.device))
        values = {name: batch_size * args.new_tokens / each for name, each in times.items()}
        kind = "decoding, compiled" if compiled else "decoding"
        yield {"kind": kind, "dtype": dtype, "shape": shape, "tokens": batch_size, "unit": "tokens/s", "values": values}


if __name__ == "__main__":
    main()
