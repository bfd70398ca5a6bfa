# Copyright 2026 The MoeVlm authors. Licensed under the Apache License, Version 2.0.
"""Score a checkpoint, ours or any image-text-to-text model of transformers, on a data mixture; compare two runs.

    python run_eval.py --model_name_or_path outputs/demo --output_dir outputs/demo/eval --blind
    torchrun --nproc_per_node 2 run_eval.py --model_name_or_path outputs/demo --num_shots 2 --resume
    python run_eval.py --predictions predictions_caption.json --data my.yaml --output_dir outputs/theirs
    python run_eval.py compare outputs/theirs outputs/eval

Writes metrics.json, predictions_<task>.json, samples.jsonl (each sample's scores), report.html, plots/ and samples.png.
"""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import evaluate
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from moevlm import answers_moevlm as answers
from moevlm import evaluation_moevlm as evaluation
from moevlm import report_moevlm as report
from moevlm.baselines_moevlm import commonest_answers, load_model, without_pictures
from moevlm.comparison_moevlm import as_text, compare
from moevlm.data_moevlm import load_mixture
from moevlm.reporting_moevlm import table
from moevlm.tasks_moevlm import CompareArguments, EvalArguments, draw, load_tasks, with_examples
from moevlm.telemetry_moevlm import DroppedVisits

ROOT = Path(__file__).resolve().parent
METRICS = ("cider", "caption_overlap", "vqa_accuracy")


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare_runs()
    (args,) = transformers.HfArgumentParser(EvalArguments).parse_args_into_dataclasses()
    state, tasks = PartialState(cpu=args.on_cpu), load_tasks(args.tasks, ROOT / "configs/tasks")
    with answers.warnings_of("moevlm") as notes, state.main_process_first():
        samples, problems = answers.checked(read_samples(args, tasks, args.part))
        fitting = bool(args.idf) and not Path(args.idf).exists()
        train = read_samples(args, tasks, "train") if args.blind or args.num_shots or fitting else []
        answers.settle([*notes, *problems], skip=args.skip_bad_rows)
    samples = draw(samples, args.max_samples, args.seed)
    if args.predictions:
        given, wrong = answers.read_answers(Path(args.predictions), samples)
        answers.settle(wrong, skip=args.skip_bad_rows)
        samples = [sample for sample in samples if (sample.task, sample.id) in given]
        columns, told = {args.part: [given[one.task, one.id] for one in samples]}, {}
        problems += wrong
    scorers = load_scorers(args, train) if state.is_main_process else None
    if not args.predictions:
        with answers.warnings_of("moevlm") as heard:
            columns, told = answer(args, tasks, samples, train, state)
        notes += dict.fromkeys(gather_object(heard))
    if state.is_main_process:
        columns |= {"question_only": commonest_answers(train, samples)} if args.blind else {}
        problems += answers.empty_answers(samples, columns[args.part])
        run = asdict(args) | told | {"processes": state.num_processes, "transformers": transformers.__version__}
        conclude(args, samples, columns, scorers, run, notes + [str(problem) for problem in problems])
        if not args.predictions:
            answers.finish(Path(args.output_dir))
    state.destroy_process_group()


def read_samples(args, tasks, part):
    """What the tasks ask of the part, in their words; bad rows are left out, counted, and stop the run in `settle`."""
    rows = load_mixture(args.data, part, grouped=False, skip_bad_rows=True, most_of_a_stream=args.stream_records(part))
    samples = evaluation.samples_from(rows)
    asked = [sample for task in tasks for sample in task.samples(samples)]
    lacking = [task.name for task in tasks if all(sample.task != task.name for sample in asked)]
    if lacking and part != "train" and (args.tasks or not asked):
        raise ValueError(f"data={args.data}: {part} has no record for the tasks {', '.join(lacking)}")
    return asked


def answer(args, tasks, samples, train, state):
    """The answers by column, on every rank, each batch on the disk before the next begins; and what that took."""
    model, processor = load_model(args.model_name_or_path, args.dtype, args.device or state.device)
    prompts = with_examples(samples, train, args.num_shots, seed=args.seed) if args.num_shots else samples
    asked = {args.part: prompts}
    asked |= {"blind": prompts, "text_only": [without_pictures(sample) for sample in prompts]} if args.blind else {}
    folder, now = Path(args.output_dir), answers.settings_of(args, tasks, prompts)
    known = answers.start(folder, now, resume=args.resume) if state.is_main_process else None
    known = broadcast_object_list([known])[0]
    journal = answers.Journal(folder, state.process_index)
    settings = {"batch_size": args.batch_size, "seed": args.seed}
    settings["max_new_tokens"] = {task.name: args.max_new_tokens or task.max_new_tokens for task in tasks}
    columns, told, visits = {}, {}, DroppedVisits(model)
    for name, chosen in asked.items():
        start = time.perf_counter()
        memory = {"known": answers.places_of(known, name, chosen), "keep": partial(journal.add, name, chosen)}
        columns[name] = evaluation.predict(model, processor, chosen, blind=name == "blind", **memory, **settings)
        told[name] = {"seconds": time.perf_counter() - start, "dropped_visits": visits.take()}
    journal.close()
    answered = len(samples) - len(answers.places_of(known, args.part, samples))
    return columns, told[args.part] | {"answers_per_second": answered / told[args.part]["seconds"]}


def load_scorers(args, train):
    """The metrics and their rules; what is wrong with them shows here, before a model answers."""
    metrics = {name: evaluate.load(str(ROOT / "metrics" / name)) for name in METRICS}
    metrics["caption_overlap"].check_java_metrics(args.java_metrics)
    idf = answers.idf_table(Path(args.idf), train, metrics["cider"].document_frequencies) if args.idf else None
    return metrics, evaluation.Rules(idf, args.java_metrics, args.normalize)


def conclude(args, samples, columns, scorers, run, notes):
    """Score, print, and leave every file."""
    (metrics, rules), interval = scorers, partial(evaluation.bootstrap_interval, seed=args.seed)
    score_each = partial(evaluation.score_each, metrics=metrics, seed=args.seed, rules=rules)
    scored = {name: score_each(samples, said) for name, said in columns.items()}
    results, said = {name: scores for name, (scores, _) in scored.items()}, columns[args.part]
    details = [answers.detail(*each) for each in zip(samples, said, scored[args.part][1], strict=True)]
    notes = [*notes, *report.without_interval(results[args.part], args.java_metrics), *report.dropped_visits(run)]
    print("\n".join([table(results), *(f"note: {note}" for note in notes)]))
    kinds = report.by_kind(details, interval)
    figures = report.plot_scores(results, details, kinds)
    about = {"model": args.predictions or args.model_name_or_path, "data": args.data, "part": args.part}
    about |= {"examples": args.num_shots, "seed": args.seed, "processes": run["processes"]}
    page = report.page(results, details, figures, about=about, notes=notes, pictures=lambda at: samples[at].images)
    own = {task: numbers | {"by_kind": kinds.get(task, {})} for task, numbers in results.pop(args.part).items()}
    folder = Path(args.output_dir)
    answers.write(folder, samples, details, own | results | {"problems": notes, "run": run})
    report.save_figures(figures, folder / "plots")
    answers.replace(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    answers.replace(folder / "samples.png", lambda path: report.draw_samples(samples, said, str(path)))
    speed = f"{run['answers_per_second']:.0f} answers a second; " if "seconds" in run else ""
    print(f"{speed}scores, report.html and predictions are in {folder}")


def compare_runs():
    """Second minus first of two scored runs."""
    parser = transformers.HfArgumentParser(CompareArguments, prog="run_eval.py compare")
    parser.add_argument("runs", nargs=2, help="Output folders of run_eval.py, or a predictions_<task>.json in each.")
    args, given = parser.parse_args_into_dataclasses(sys.argv[2:])
    first, second = (answers.read_details(Path(path)) for path in given.runs)
    handed = {"statistic_of": evaluation.statistic_of, "cider": evaluate.load(str(ROOT / "metrics/cider"))}
    found = compare(first, second, interval=partial(evaluation.bootstrap_interval, seed=args.seed), **handed)
    print(as_text(found, given.runs, shown=args.shown))
    if args.output:
        answers.write_json(Path(args.output), found)


if __name__ == "__main__":
    main()
