#!/usr/bin/env bash
# One training run. If it is killed, submit it again with the same arguments: it resumes from its last epoch.
#   sbatch scripts/slurm/train.sh tissue=lung encoder.weights=vit256_small_dino.pth
#   RUN=outputs/lung/wide sbatch scripts/slurm/train.sh tissue=lung 'model.net.hidden=[512,512]'
#   sbatch --gres=gpu:4 --ntasks-per-node=4 scripts/slurm/train.sh tissue=lung     # DDP on one node
# Run prepare.sh first, so that no GPU waits for features.
#SBATCH --job-name=prts-train
#SBATCH --output=%x-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --gres=gpu:1
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# the arguments name the run, so that the same command finds it again
RUN=${RUN:-outputs/slurm/$(printf '%s\n' "$@" | sha256sum | cut -c1-8)}

if [ -f "$RUN/metrics.json" ]; then
    echo "$RUN is finished"
    exit 0
fi
arguments=("$@" "hydra.run.dir=$RUN" resume=true)
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
    # Lightning takes one process per GPU from srun
    exec srun "${PRTS:-.venv/bin/prts}" train "${arguments[@]}" trainer=ddp
fi
exec "${PRTS:-.venv/bin/prts}" train "${arguments[@]}"
