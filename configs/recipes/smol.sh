#!/bin/sh
# The whole chain of smol, one line a stage: python and its packages as in the environment that is active.
# Usage: configs/recipes/smol.sh [flags of run_finetune.py for all three trainings, such as --seed 1]
set -e
[ -e outputs/demo/config.json ] || python run_finetune.py --recipe configs/recipes/demo.yaml --overwrite_output_dir
python run_upcycle.py --recipe configs/recipes/smol_dense.yaml --overwrite_output_dir
python run_finetune.py --recipe configs/recipes/smol_align.yaml --overwrite_output_dir "$@"
python run_finetune.py --recipe configs/recipes/smol_adapt.yaml --overwrite_output_dir "$@"
python run_upcycle.py --recipe configs/recipes/smol_upcycle.yaml --overwrite_output_dir
python run_finetune.py --recipe configs/recipes/smol_sparse.yaml --overwrite_output_dir "$@"
# What stages 3 and 4 changed: both models on the same 200 test samples of each task, sample by sample.
for stage in adapted tuned; do
    python run_eval.py --model_name_or_path outputs/smol/$stage --data configs/data/smol_tune.yaml --max_samples 200 \
        --output_dir outputs/smol/$stage/eval
done
python run_eval.py compare outputs/smol/adapted/eval outputs/smol/tuned/eval
