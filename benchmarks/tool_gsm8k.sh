# SmolLM2-135M-Instruct on GSM8K with the Python tool against without: SFT on worked answers, then GRPO. One GPU, bubblewrap.
#   bash benchmarks/tool_gsm8k.sh MODEL_FOLDER GSM8K_FOLDER OUT [SFT_STEPS] [GRPO_STEPS]
# For a look on a CPU: any small model with a chat template, SMALL=1.
set -eu
model=$1 data=$2 out=$3 sft=${4:-60} steps=${5:-20}
mkdir -p "$out"
rows=64 prompts=32 group=8 tokens=384
[ -z "${SMALL:-}" ] || { rows=4 prompts=2 group=2 tokens=96; }
run="python3 -m torch.distributed.run --standalone --nproc_per_node=1"
for tool in yes no; do
    python3 - "$data" "$out/sft-$tool.jsonl" $tool <<'P'
import json, sys
sys.path.insert(0, ".")
from examples.maths_tool import GSM8KWithPython as Task
data, out, tool = sys.argv[1:]
kept = 0
with open(out, "w") as file:
    for e in map(json.loads, open(f"{data}/train.jsonl")):
        if chat := Task.conversation(e["question"], e["answer"], tool == "yes"):
            chat = [{"role": "system", "content": Task.system}, *chat]
            file.write(json.dumps({"messages": chat}) + "\n")
            kept += 1
print(f"{kept} conversations, tool: {tool}")
P
    $run sft.py --model="$model" --data="$out/sft-$tool.jsonl" --steps=$sft --rows_per_step=$rows --max_tokens=640 --lr=1e-4 \
        --tokens_per_microbatch=16384 --eval_every=0 --save_every=0 --run_dir="$out/sft-$tool"
    $run grpo.py --model="$out/sft-$tool/model" --task=examples/maths_tool.py:GSM8KWithPython --task_data="$data" \
        --task_settings.tool=$tool --num_generators=0 --steps=$steps --prompts_per_step=$prompts --group_size=$group --max_turns=3 \
        --max_prompt_tokens=512 --max_new_tokens=$tokens --lr=2e-6 --tokens_per_microbatch=16384 --gpu_memory_utilization=0.4 \
        --eval_size=256 --eval_every=$steps --save_every=0 --run_dir="$out/grpo-$tool"
done
python3 - "$out" <<'P'
import json, sys
for tool in ("yes", "no"):
    lines = [json.loads(x) for x in open(f"{sys.argv[1]}/grpo-{tool}/metrics.jsonl")]
    steps, evals = ([x for x in lines if k in x] for k in ("loss", "eval_reward"))
    mean = lambda rows: sum(x["reward"] for x in rows) / len(rows)
    judged = ", ".join(f"version {x['step']}: {x['eval_reward']:.3f} +- {x['eval_stderr']:.3f}" for x in evals)
    print(f"tool {tool}: reward {mean(steps[:5]):.3f} -> {mean(steps[-5:]):.3f}; held out, greedy: {judged}; mismatch KL {steps[-1]['mismatch_kl']:.2g}")
P
