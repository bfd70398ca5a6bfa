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
