#!/bin/bash
# On one CUDA GPU: what is marked gpu (under 2 minutes on an H100), and the speed tables beside the peers that are given
# (an expected 6 to 8 minutes each: a contender of the whole step takes 30 to 45 seconds to compile there).
# All of it runs whatever fails; the exit status is the worst one.
#
#     tools/gpu_check.sh tests
#     tools/gpu_check.sh tables FOLDER_FOR_JSON [FOLDER OF nanoGPT]
#     tools/gpu_check.sh more_tables FOLDER_FOR_JSON [FOLDER OF THE PAPER'S CODE]
set -uo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python || command -v python3) || { echo "gpu_check: there is no python" >&2; exit 2; }
"$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
  { echo "gpu_check: $python has no PyTorch that finds a CUDA GPU" >&2; exit 2; }
out=${2-}
needs_folder() { [ -n "$out" ] && mkdir -p "$out" || { echo "gpu_check: name a folder for the JSON files" >&2; exit 2; }; }
quick="--rounds 5 --seconds 0.5"
worst=0
run() { "$python" -m "$@" || { status=$?; [ $status -gt $worst ] && worst=$status; }; }
case ${1-} in
  tests)
    run pytest -m gpu -rs ;;
  tables)
    needs_folder
    run tools.bench config/gpt2_124m.py --micro_batch_size=16 --batch_size=16 ${3:+--peer nanogpt=$3} $quick \
      --parts step,head,loader --methods baseline,mu_centering,softcap --json "$out/gpu-124m.json" ;;
  more_tables)
    needs_folder
    run tools.bench config/paper_109m.py --micro_batch_size=24 --batch_size=24 ${3:+--peer oec=$3} $quick \
      --parts step --methods baseline,mu_centering --json "$out/gpu-109m.json"
    run tools.bench config/gpt2_124m.py --micro_batch_size=32 --batch_size=32 $quick --parts step --methods mu_centering \
      --variant "124M, 64"="config/oec.py --micro_batch_size=64 --batch_size=64" \
      --variant "350M, 16"="config/oec.py --n_layer=24 --n_head=16 --n_embd=1024 --micro_batch_size=16 --batch_size=16" \
      --json "$out/gpu-mfu.json" ;;
  *)
    echo "gpu_check: say tests, tables FOLDER or more_tables FOLDER" >&2; exit 2 ;;
esac
exit $worst
