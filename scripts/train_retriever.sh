#!/usr/bin/env bash
# The recipes of scripts/configs/retriever at the size their papers trained at, on 8 GPUs.
#
#   sleuth convert ... ; sleuth mine ...        (docs/training-retrievers.md)
#   bash scripts/train_retriever.sh METHOD EXAMPLES.jsonl CORPUS.jsonl [--key value ...]
#
# METHOD: dpr, bge, splade, colbert, cross_encoder, dse, colpali, gme, repllama, e5_mistral. Batch sizes are a
# process's; negatives are gathered across all. Options given here win. Not run at this scale yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (( $# < 3 )); then
  sed -n '2,9p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
method=$1 examples=$2 corpus=$3
shift 3
negatives=7 form=tuple labels=false
case $method in
  # Karpukhin et al. 2020: 128 questions, one BM25 negative, 40 epochs.
  dpr) negatives=1; paper=(--batch_size 16 --epochs 40 --learning_rate 2e-5 --max_grad_norm 2.0) ;;
  # Xiao et al. 2023, fine-tuning: temperature .02, 7 negatives and the teacher's scores.
  bge) labels=true; paper=(--batch_size 128 --epochs 5 --learning_rate 1e-5) ;;
  # Formal et al. 2021: batch 124, 150,000 steps.
  splade) negatives=1; paper=(--batch_size 16 --steps 150000 --learning_rate 2e-5) ;;
  # Santhanam et al. 2022: 64-way distillation, batch 32, 400,000 steps.
  colbert) negatives=63; labels=true; paper=(--batch_size 4 --steps 400000 --learning_rate 1e-5) ;;
  cross_encoder) form=pair; paper=(--batch_size 32 --epochs 2 --learning_rate 2e-5) ;;
  # Ma et al. 2024: batch 128, one hard negative, LoRA.
  dse) negatives=1; paper=(--batch_size 16 --epochs 1 --learning_rate 1e-4) ;;
  # Faysse et al. 2024: batch 256 in all, 5 epochs of its script, LoRA.
  colpali) negatives=0; paper=(--batch_size 32 --epochs 5 --learning_rate 2e-4) ;;
  # Zhang et al. 2024: 8 hard negatives, temperature .03, LoRA.
  gme) negatives=8; paper=(--batch_size 16 --epochs 1 --learning_rate 1e-4) ;;
  # Ma et al. 2023: batch 128, 15 hard negatives, LoRA. 7B: the weights are divided.
  repllama) negatives=15; paper=(--batch_size 16 --epochs 1 --learning_rate 1e-4 --sharding fsdp) ;;
  # Wang et al. 2023: batch 2,048, one hard negative, LoRA. 7B: the weights are divided.
  e5_mistral) negatives=1; paper=(--batch_size 256 --steps 1000 --learning_rate 1e-4 --sharding fsdp) ;;
  *) echo "train_retriever.sh: method $method: must be one of dpr bge splade colbert cross_encoder dse colpali gme" \
      "repllama e5_mistral" >&2
    exit 2 ;;
esac
train="[{\"examples\": \"$examples\", \"corpus\": \"$corpus\", \"negatives\": $negatives,
  \"form\": \"$form\", \"labels\": $labels}]"
exec accelerate launch --num_processes 8 -m scripts train-retriever --config "scripts/configs/retriever/$method.yaml" \
  --train "$train" --precision bfloat16 --out "runs/retriever/$method-full" "${paper[@]}" "$@"
