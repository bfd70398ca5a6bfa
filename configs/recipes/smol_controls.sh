#!/bin/sh
# What smol is compared with, after configs/recipes/smol.sh with the same flags: its dense parent tuned in the same way, and
# the chain in another order, sparse before alignment.
set -e
tune="python run_finetune.py --overwrite_output_dir --recipe configs/recipes"
$tune/smol_sparse.yaml --model_name_or_path outputs/smol/adapted --output_dir outputs/smol/dense_tuned "$@"
python run_upcycle.py --recipe configs/recipes/smol_upcycled.yaml --overwrite_output_dir
$tune/smol_align.yaml --model_name_or_path outputs/smol/upcycled --output_dir outputs/smol/early_aligned "$@"
$tune/smol_adapt.yaml --model_name_or_path outputs/smol/early_aligned --output_dir outputs/smol/early_adapted "$@"
$tune/smol_sparse.yaml --model_name_or_path outputs/smol/early_adapted --output_dir outputs/smol/early_tuned "$@"
