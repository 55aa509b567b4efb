# Five steps of a small real model, 1 generator + 1 trainer, at ages 0 and 1, every sync proven. Two GPUs.
#   bash benchmarks/smoke_gpu.sh MODEL_FOLDER GSM8K_FOLDER OUT
set -eu
model=$1 data=$2 out=$3
for age in 0 1; do
    python3 -m torch.distributed.run --standalone --nproc_per_node=2 grpo.py --model="$model" --task=gsm8k --task_data="$data" \
        --steps=5 --prompts_per_step=32 --group_size=8 --max_prompt_tokens=512 --max_new_tokens=256 --max_turns=1 --lr=1e-6 \
        --tokens_per_microbatch=16384 --eval_size=64 --eval_every=5 --check_weights=true --max_policy_age=$age --run_dir="$out/age$age"
done
python3 - "$out" <<'P'
import json, sys
keys = "step reward tokens mismatch_kl mismatch_abs mismatch_max policy_age grad_norm step_s generate_s train_s sync_s idle_generator_s idle_trainer_s tokens_per_second".split()
for age in (0, 1):
    print(f"age {age}:", " ".join(keys))
    for line in map(json.loads, open(f"{sys.argv[1]}/age{age}/metrics.jsonl")):
        print(" ".join(f"{line[k]:.4g}" for k in keys) if "reward" in line else f"evaluation {line}")
P
