#!/usr/bin/env bash
# Many slides: each array task is a worker that takes the next slide that no other has. Submit it again for what is left.
#   sbatch --array=1-8 scripts/slurm/cohort.sh bundle=model slides=slides out=predictions [key=value ...]
# A worker that runs out of time gives up the slide in hand; another one, or the next submission, goes on from what is in the cache.
#SBATCH --job-name=prts-cohort
#SBATCH --output=%x-%A_%a.log
#SBATCH --array=1-4
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

exec "${PRTS:-.venv/bin/prts}" predict "$@"
