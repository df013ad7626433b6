#!/bin/bash
# On one CUDA GPU, under 8 minutes: everything marked gpu, then the speed tables, beside the peers that are given.
#
#     tools/gpu_check.sh [FOLDER OF nanoGPT] [nanoGPT FOLDER OF THE PAPER'S CODE]
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu_check: PyTorch finds no CUDA GPU here")'
nanogpt=${1:+--peer nanogpt=$1}
paper=${2:+--peer oec=$2}
stamp=$(date +%Y%m%d-%H%M%S)
python -m pytest -m gpu -rs
quick="--rounds 5 --seconds 1"
python -m tools.bench config/gpt2_124m.py --micro_batch_size=16 --batch_size=16 $nanogpt $quick \
  --parts step,head,loader --json "results/gpu-124m-$stamp.json"
python -m tools.bench config/paper_109m.py --micro_batch_size=24 --batch_size=24 $paper $quick \
  --parts step --methods baseline,mu_centering --json "results/gpu-109m-$stamp.json"
python -m tools.bench config/gpt2_124m.py --micro_batch_size=32 --batch_size=32 $quick --parts step --methods mu_centering \
  --variant "124M, 64"="config/oec.py --micro_batch_size=64 --batch_size=64" \
  --variant "350M, 16"="config/oec.py --n_layer=24 --n_head=16 --n_embd=1024 --micro_batch_size=16 --batch_size=16" \
  --json "results/gpu-mfu-$stamp.json"
