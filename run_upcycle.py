# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Make a MoeVlm of pretrained parts, with proof that nothing was lost; make it smaller again; plan a large one.

    python run_upcycle.py --vision google/siglip-base-patch16-224 --text HuggingFaceTB/SmolLM2-360M-Instruct \
        --num_experts 4 --num_experts_per_tok 2 --output_dir outputs/upcycled
    python run_upcycle.py downcycle --model_name_or_path outputs/upcycled --to_experts 2 --output_dir outputs/smaller
    python run_upcycle.py plan --model_name_or_path outputs/upcycled --devices 8

`python run_upcycle.py [downcycle|plan] --help` lists the flags.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch
from transformers import AutoProcessor, logging

from moevlm import proof_moevlm as proof
from moevlm import upcycling_moevlm as upcycling
from moevlm.carryover_moevlm import read_generation_config, read_processor, read_tokenizer, stop_at_answers_end
from moevlm.checkpoints_moevlm import whole_folder
from moevlm.collating_moevlm import MoeVlmCollator, encode_record
from moevlm.configmaps_moevlm import dense_config, is_tied
from moevlm.data_moevlm import load_mixture
from moevlm.downcycling_moevlm import DowncycleArguments, check_experts, count_use, made_smaller
from moevlm.keymaps_moevlm import DenseTwin, map_parents
from moevlm.modeling_moevlm import MoeVlmForConditionalGeneration
from moevlm.parents_moevlm import Shards, Sources, load_parent, open_parents, read_configs
from moevlm.planning_moevlm import PlanArguments, plan, plan_table
from moevlm.recipes_moevlm import parse
from moevlm.summary_moevlm import DECODER


@dataclass
class UpcycleArguments(Sources):
    output_dir: str = field(default="outputs/upcycled", metadata={"help": "Checkpoint and upcycling.json go here."})
    tokenizer: str | None = field(default=None, metadata={"help": "Folder or Hub id, where the parent has none."})
    dtype: str | None = field(default=None, metadata={"help": "Else the parent's.", "choices": upcycling.DTYPES})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weight file."})
    skip_proof: bool = field(default=False, metadata={"help": "Do not compare with the parents."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace what is ours in output_dir."})


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    command = sys.argv.pop(1) if sys.argv[1:2] in (["downcycle"], ["plan"]) else "upcycle"
    {"upcycle": upcycle, "downcycle": downcycle, "plan": show_plan}[command]()


def upcycle():
    args, recipe = parse((UpcycleArguments, upcycling.Recipe), sys.argv[1:])
    sources = filter(None, [*args.roles.values(), args.tokenizer])
    with whole_folder(args.output_dir, args.overwrite_output_dir, sources) as folder:
        parents = open_parents(args.roles)
        main_parent = parents.get("whole") or parents["text"]
        tokenizer = read_tokenizer(parents, args.tokenizer)
        dense, notes = dense_config(
            {role: parent.config for role, parent in parents.items()},
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            tied=main_parent.tied,
            **args.joint,
        )
        sparse, remarks = upcycling.sparse_config(dense, recipe)
        shapes = upcycling.shapes_of(dense)
        maps = map_parents(parents, shapes)
        fresh = {} if "whole" in parents else upcycling.fresh_parts(dense, "vision" not in maps, recipe.upcycle_seed)
        twin = proof.Remembering(DenseTwin(shapes, [(parents[role].weights, maps[role]) for role in maps], fresh))
        dtype = getattr(torch, args.dtype) if args.dtype else twin[f"{DECODER}embed_tokens.weight"].dtype
        model = upcycling.build(upcycling.sparsify(twin, dense, sparse, recipe, dtype), sparse, dtype)
        model.generation_config = read_generation_config(main_parent)
        processor = read_processor(parents, tokenizer, sparse)
        stop_at_answers_end(model.generation_config, processor, main_parent.notes)
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        processor.save_pretrained(folder)
        proof.refuse_other_files(Shards(folder), model)
        report = {
            "parents": {role: {"source": parent.source, "family": parent.family} for role, parent in parents.items()},
            "recipe": asdict(recipe),
            "dtype": str(dtype).removeprefix("torch."),
            "keys": proof.account_for(maps, shapes, upcycling.shapes_of(sparse), fresh),
            "parameters": {"before": parameters(dense), "after": parameters(sparse)},
            "notes": notes + remarks + proof.rounding(twin.dtypes, fresh, dtype),
            "proof": {} if args.skip_proof else proof.prove(model, parents, load_parent, args.vision_feature_layer),
        }
        proof.refuse_difference(report["proof"], kept := upcycling.kept_outputs(dense, sparse, recipe))
        if report["proof"].keys() - kept:
            # Varied experts hide what went wrong before them; the twin has none.
            model = upcycling.build(upcycling.sparsify(twin, dense, dense, recipe, dtype), dense, dtype)
            report["proof_of_twin"] = proof.prove(model, parents, load_parent, args.vision_feature_layer)
            proof.refuse_difference(report["proof_of_twin"])
        report["notes"] += [note for parent in parents.values() for note in parent.notes]
        (folder / "upcycling.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{proof.table_of(report)}\n\nCheckpoint and upcycling.json: {args.output_dir}")


def downcycle():
    (args,) = parse((DowncycleArguments,), sys.argv[1:])
    with whole_folder(args.output_dir, args.overwrite_output_dir, [args.model_name_or_path]) as folder:
        model = MoeVlmForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype="auto").eval()
        processor = AutoProcessor.from_pretrained(args.model_name_or_path)
        if args.to_experts:
            check_experts(model.config, args.to_experts)
        batches = batches_of(args, processor)
        use, before = count_use(model, batches)
        state, config, remarks = made_smaller(model.state_dict(), model.config, use, args)
        smaller = upcycling.build(state, config, model.dtype)
        smaller.generation_config = model.generation_config
        smaller.save_pretrained(folder)
        processor.save_pretrained(folder)
        _, after = count_use(smaller, batches)
        visits = {name: layer.visits.int().tolist() for name, layer in use.items()}
        sizes = {"before": parameters(model.config), "after": parameters(config)}
        report = {"loss": {"before": before, "after": after}, "parameters": sizes, "visits": visits, "notes": remarks}
        (folder / "downcycling.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"loss {before:.4f} -> {after:.4f}; parameters {sizes['before']['total']:,} -> {sizes['after']['total']:,}")
    print("\n".join([*remarks, f"Checkpoint and downcycling.json: {args.output_dir}"]))


def show_plan():
    sources, recipe, arguments = parse((Sources, upcycling.Recipe, PlanArguments), sys.argv[1:])
    configs = read_configs(sources.roles)
    tied = is_tied(configs.get("whole") or configs["text"])
    dense, notes = dense_config(configs, vocab_size=0, image_token_id=0, tied=tied, **sources.joint)
    config, remarks = upcycling.sparse_config(dense, recipe)
    print("\n".join([plan_table(plan(config, arguments), arguments), *notes, *remarks]))


def batches_of(args, processor):
    """Encoded and collated batches of the records that a model is made smaller by."""
    records = islice(load_mixture(args.data, "eval", grouped=True), args.max_samples)
    rows = [{"images": record["images"], **encode_record(record, processor)} for record in records]
    collate = MoeVlmCollator(processor)
    return [collate(rows[start : start + args.batch_size]) for start in range(0, len(rows), args.batch_size)]


def parameters(config) -> dict[str, int]:
    """Total and active parameters of a model of this config; nothing is allocated."""
    with torch.device("meta"):
        summary = MoeVlmForConditionalGeneration(config).moe_summary()
    return {"total": summary.parameters, "active": summary.active_parameters}


if __name__ == "__main__":
    main()
