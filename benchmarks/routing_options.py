# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Train one recipe with each way to route, several seeds each: a Markdown table of scores, load, entropy and time.

    python benchmarks/routing_options.py --recipe configs/recipes/demo.yaml --seeds 0 1 2 --output_dir outputs/routing
    python benchmarks/routing_options.py --options softmax dense --seeds 0 --extra "--max_steps 500"

A run that is there already is not trained again: an interrupted comparison goes on where it stopped, and several
commands may fill one folder, such as one for each seed on a core of its own (`OMP_NUM_THREADS=1 taskset -c 0 ...`),
before one with all seeds makes the table. Nor is a run that stands in `--record`, the `routing.json` of an earlier
command, perhaps of another machine; `benchmarks/routing-demo.json` holds the runs of docs/recipes.md. Every run is a
`run_finetune.py` with the recipe's architecture and the option's fields in its `text_config`. The time of a training
step is measured by itself at the end, all options in turn, as runs beside others would tell little about it. Writes
`routing.json` (each run's numbers) and `routing.md` into the folder.
"""

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import yaml
from tqdm import tqdm
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moevlm import benchmarking_moevlm as bench  # noqa: E402
from moevlm.configuration_moevlm import MoeVlmConfig  # noqa: E402
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration  # noqa: E402

# What each changes in the recipe's own router: softmax, top-2 of 8, renormalised, balance and z-loss. The weight of a
# lone expert is not renormalised: it would always be 1, and the router learn nothing from the answers.
OPTIONS = {
    "softmax": {},
    "no balance loss": {"router_aux_loss_coef": 0.0},
    "no z-loss": {"router_z_loss_coef": 0.0},
    "top-1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "loss-free": {"scoring_func": "sigmoid", "use_router_bias": True, "router_aux_loss_coef": 0.0},
    "jitter": {"router_jitter_noise": 0.1},
    "balance per modality": {"router_aux_loss_per_modality": True},
    "LIMoE entropies": {
        "router_aux_loss_coef": 0.0,
        "router_local_entropy_coef": 0.01,
        "router_global_entropy_coef": 0.1,
    },
    "groups": {"n_group": 4, "topk_group": 2},
    "dynamic width": {"router_top_p": 0.6, "norm_topk_prob": False, "router_local_entropy_coef": 0.01},
    "modality mask": {"expert_modalities": ["shared"] * 4 + ["image"] * 2 + ["text"] * 2},
    "shared expert": {"num_experts_per_tok": 1, "norm_topk_prob": False, "n_shared_experts": 1},
    "dense": {"moe_layers": "none"},
}


@dataclass
class ComparisonArguments:
    """What to train, how often, and where it goes."""

    recipe: str = field(default=str(ROOT / "configs/recipes/demo.yaml"), metadata={"help": "Recipe of every run."})
    options: list[str] = field(default_factory=lambda: list(OPTIONS), metadata={"help": f"Any of {list(OPTIONS)}."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run each."})
    processes: int = field(default=1, metadata={"help": "Of torchrun; each takes the recipe's batch."})
    extra: str = field(default="", metadata={"help": "More flags of run_finetune.py, in quotes."})
    seconds: float = field(default=60.0, metadata={"help": "Of measuring the time of a step."})
    record: Optional[str] = field(default=None, metadata={"help": "A routing.json whose runs are taken as they are."})
    output_dir: str = field(default="outputs/routing", metadata={"help": "A folder for each run goes here."})


def main():
    (args,) = HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses()
    if unknown := set(args.options) - set(OPTIONS):
        raise ValueError(f"options={sorted(unknown)} are unknown; take any of {', '.join(OPTIONS)}")
    machine = bench.machine()
    runs = [(option, seed) for seed in args.seeds for option in args.options]
    recorded = json.loads(Path(args.record).read_text(encoding="utf-8"))["runs"] if args.record else {}
    found = {option: [] for option in args.options}
    for option, seed in tqdm(runs, desc="training"):
        known = [run for run in recorded.get(option, []) if run["seed"] == seed]
        found[option] += known or [{"seed": seed, "cpu": machine["cpu"], **reached(args, option, seed)}]
    times = step_times(args.recipe, args.options, args.seconds)
    text = table(found, times)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    (Path(args.output_dir) / "routing.md").write_text(text + "\n", encoding="utf-8")
    results = {"runs": found, "step_seconds": times, "machine": machine}
    (Path(args.output_dir) / "routing.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(text)


def reached(args, option, seed):
    """The numbers of a run, which is made unless it is there."""
    folder = Path(args.output_dir) / f"{option.replace(' ', '-')}-{seed}"
    if not (folder / "metrics.json").exists():
        train(args, OPTIONS[option], seed, folder)
    return numbers(folder)


def architecture(recipe, changes):
    """The recipe's config as a dict, with `changes` in its decoder."""
    path = Path(recipe)
    named = yaml.safe_load(path.read_text(encoding="utf-8")).get("config")
    config = json.loads((path.parent / named if named else ROOT / "configs/tiny.json").read_text(encoding="utf-8"))
    config["text_config"].update(changes)
    return config


def train(args, changes, seed, folder):
    """One run into `folder`; its output stands in `folder/log.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "architecture.json"
    config.write_text(json.dumps(architecture(args.recipe, changes), indent=2) + "\n", encoding="utf-8")
    flags = ["--recipe", args.recipe, "--config", str(config), "--seed", str(seed), "--output_dir", str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.processes), "--standalone"]
    command += [str(ROOT / "run_finetune.py"), *flags, "--overwrite_output_dir", *shlex.split(args.extra)]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def numbers(folder):
    """What one run reached: scores by name, its routers' state at the last log."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    last = next((entry for entry in reversed(history) if "expert_load" in entry), {"expert_load": {}})
    loads = last["expert_load"].items()
    entropies = [value for name, value in last.items() if name.startswith("router_entropy_")]
    return {
        "VQA": metrics["vqa"]["vqa_accuracy"],
        "positions": metrics["vqa"].get("per_answer_type", {}).get("position"),
        "CIDEr": metrics["caption"]["CIDEr"],
        "turns": metrics["chat"]["turn_accuracy"],
        # 1 is even; E is one expert for all.
        "largest load": max((max(load) * len(load) / sum(load) for _, load in loads), default=None),
        "entropy": statistics.fmean(entropies) if entropies else None,
    }


def step_times(recipe, options, seconds, rows=16, length=128):
    """Seconds of a training step of each option, medians of interleaved rounds.

    Args:
        rows: B of the batch, one picture each.
        length: S, tokens of a row, image tokens included; all the others are learnt.
    """
    runs = {}
    for option in options:
        config = MoeVlmConfig.from_dict(architecture(recipe, OPTIONS[option]))
        model = MoeVlmForConditionalGeneration(config).train()
        image, seen = config.vision_config, config.image_seq_length
        ids = torch.randint(10, 500, (rows, length), generator=torch.Generator().manual_seed(0))
        labels = ids.masked_fill(torch.arange(length) < seen, -100)
        ids[:, :seen] = config.image_token_id
        pictures = torch.randn(rows, image.num_channels, image.image_size, image.image_size)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pictures}
        runs[option] = partial(step, model, torch.optim.AdamW(model.parameters()), batch)
    return bench.medians(bench.interleaved(runs, seconds))


def step(model, optimizer, batch, _):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def table(found, times):
    """A Markdown table: for each option the mean of its runs and their range in brackets, and the time of a step."""
    columns = [name for name in next(runs for runs in found.values() if runs)[0] if name not in ("seed", "cpu")]
    lines = ["| router | runs | " + " | ".join(columns) + " | ms a step |", "|---" * (len(columns) + 3) + "|"]
    for option, runs in found.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if run[column] is not None]
            shown = f"{statistics.fmean(values):.2f} ({min(values):.2f} .. {max(values):.2f})" if values else "-"
            cells.append(shown)
        lines.append(f"| {option} | {len(runs)} | " + " | ".join(cells) + f" | {times[option] * 1e3:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
