# SmolLM2-135M-Instruct on GSM8K: greedy accuracy on the whole test split as it comes, after SFT and after GRPO, by configs/*/smollm2_135m_gsm8k.yaml.
#   bash benchmarks/smollm2_gsm8k.sh MODEL_FOLDER GSM8K_FOLDER OUT TOOL(yes|no|before) SEED [more settings of grpo.py]
# One GPU; TOOL=yes needs bubblewrap; several at once share a GPU. SMALL=1 is a look on a CPU, with any small model that has a chat template.
set -eu
model=$1 data=$2 out=$3 tool=$4 seed=$5 name=$4-$5
shift 5
mkdir -p "$out"
sft="" grpo=""
[ -z "${SMALL:-}" ] || { sft="--epochs=0 --steps=2 --rows_per_step=4 --eval_size=4"; grpo="--steps=1 --prompts_per_step=2 --group_size=2 --max_num_seqs=16 --eval_size=8 --max_new_tokens=64"; }
run="python3 -m torch.distributed.run --standalone --nproc_per_node=1"
if [ $tool = before ]; then
    start=$model tool=no grpo="$grpo --steps=1 --prompts_per_step=1 --group_size=2"
else
    form="with_tool --max_bad=0.07"; [ $tool = yes ] || form=without_tool
    $run sft.py --config configs/sft/smollm2_135m_gsm8k.yaml --model="$model" --data="$data" --form=examples/maths_tool.py:$form --seed=$seed \
        --run_dir="$out/sft-$name" $sft
    start="$out/sft-$name/model"
fi
$run grpo.py --config configs/grpo/smollm2_135m_gsm8k.yaml --model="$start" --task_data="$data" --task_settings.tool=$tool --seed=$seed \
    --run_dir="$out/grpo-$name" $grpo "$@"
python3 - "$out/grpo-$name" $name <<'P'
import json, sys
folder, name = sys.argv[1:]
lines = [json.loads(x) for x in open(f"{folder}/metrics.jsonl")]
steps, evals = ([x for x in lines if k in x] for k in ("loss", "eval_reward"))
mean = lambda rows: sum(x["reward"] for x in rows) / len(rows)
judged = ", ".join(f"{x['step']}: {x['eval_reward']:.4f} +- {x['eval_stderr']:.4f}" for x in evals)
print(f"{name}: sampled {mean(steps[:5]):.3f} -> {mean(steps[-5:]):.3f}; greedy by version {judged}; mismatch KL {steps[-1]['mismatch_kl']:.2g}")
P
