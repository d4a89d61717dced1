#!/usr/bin/env bash
# Many slides: array task N predicts line N of a list of images. Finished slides are skipped.
#   ls slides/*.svs > slides.txt
#   sbatch --array=1-$(wc -l < slides.txt) scripts/slurm/predict_many.sh slides.txt model predictions [key=value ...]
#SBATCH --job-name=prts-predict
#SBATCH --output=%x-%A_%a.log
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
LIST=${1:?the list of images} BUNDLE=${2:?the model folder} OUT=${3:?the output folder}
shift 3

IMAGE=$(sed -n "${SLURM_ARRAY_TASK_ID:?submit it with sbatch --array=1-N}p" "$LIST")
if [ -z "$IMAGE" ]; then
    echo "$LIST has no line $SLURM_ARRAY_TASK_ID" >&2
    exit 2
fi
name=$(basename "$IMAGE")
RESULT=$OUT/${name%.*}.h5ad
if [ -f "$RESULT" ]; then
    echo "$RESULT is finished"
    exit 0
fi
mkdir -p "$OUT"
exec "${PRTS:-.venv/bin/prts}" predict "bundle=$BUNDLE" "image=$IMAGE" "out=$RESULT" "$@"
