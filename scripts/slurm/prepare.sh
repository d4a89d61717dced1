#!/usr/bin/env bash
# Segment, count and compute features for every section of a tissue. If it runs out of time, submit it again: it resumes.
#   sbatch scripts/slurm/prepare.sh tissue=lung encoder.weights=vit256_small_dino.pth
#SBATCH --job-name=prts-prepare
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --gres=gpu:1
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

exec "${PRTS:-.venv/bin/prts}" prepare "$@"
