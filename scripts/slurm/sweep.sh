#!/usr/bin/env bash
# One training run per seed: the index of the array task is the seed. Finished runs are skipped; killed ones resume.
#   sbatch --array=1-5 scripts/slurm/sweep.sh tissue=lung encoder.weights=vit256_small_dino.pth
# Each run leaves metrics.json and report.html in multirun/slurm/<hash of the arguments>/<seed>; SWEEP=DIR names another folder.
#SBATCH --job-name=prts-sweep
#SBATCH --output=%x-%A_%a.log
#SBATCH --array=1-3
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=04:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
SEED=${SLURM_ARRAY_TASK_ID:?submit it with sbatch --array=1-5}
SWEEP=${SWEEP:-multirun/slurm/$(printf '%s\n' "$@" | sha256sum | cut -c1-8)}
RUN=$SWEEP/$SEED

if [ -f "$RUN/metrics.json" ]; then
    echo "$RUN is finished"
    exit 0
fi
exec "${PRTS:-.venv/bin/prts}" train "$@" "seed=$SEED" "hydra.run.dir=$RUN" resume=true
