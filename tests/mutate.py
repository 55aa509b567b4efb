"""Put each pitfall of test_pitfalls.py back into a copy of the code, and see its test fail.

    python tests/mutate.py > tests/MUTATIONS.md     # all of them
    python tests/mutate.py 2 16                     # those of two pitfalls

The table is Markdown. A mutation whose old text is not in the code exactly once is an error: this
file follows the code.
"""

import ast
import datetime
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
LEFT_OUT = (".*", "runs", "__pycache__")
TESTS = "tests/test_pitfalls.py"

# Number of the pitfall, how it is put back, the file; then the old text and the new one. A piece of
# a line is enough, if the file has it once.
MUTATIONS = r"""
1 mean per micro-batch: trainer.py
- (loss / count)
+ (loss / rows.mask.sum())

1 divided by micro-batches: trainer.py
- (loss / count)
+ (loss / count / len(plan))

2 FSDP's own mean: model.py
- module.set_gradient_divide_factor(1.0)
+ module.set_gradient_divide_factor(float(world.num_trainers))

3 sequences weigh by length: losses.py
- if cfg.aggregation in ("token", "fixed"):
+ if cfg.aggregation in ("token", "fixed", "sequence"):

3 constant is the token mean: losses.py
- "fixed": table.weight.sum() * cfg.max_new_tokens,
+ "fixed": (table.sampled * table.weight).sum(),

3 prompt is the sequence mean: losses.py
- "prompt": len(table.index[table.weight > 0].unique()),
+ "prompt": table.weight.sum(),

4 no epsilon: losses.py
- (variance.sqrt()[group] + 1e-4)
+ variance.sqrt()[group]

4 std of one reply: losses.py
- total(centred**2) / (size - 1).clamp(min=1)
+ total(centred**2) / (size - 1)

4 means in float32: losses.py
- rollouts.returns.double()
+ rollouts.returns.float()

4 they dilute the divisor: losses.py
- weight[torch.bincount(group, rollouts.advantage.any(1).double())[group] == 0] = 0.0
+ pass

5 mask = ids != pad: rollouts.py
- column[i, : len(getattr(row, name))] = getattr(row, name)
+ values = getattr(row, name)
+             if name == "mask":
+                 values = [m and t != 0 for m, t in zip(row.mask, row.tokens)]
+             column[i, : len(values)] = values

5 pads are not forwarded: model.py
- positions < torch.tensor(room)[:, None]
+ tokens != 0

5 EOS is cut off the row: generator.py
- row.append_sampled(*turn, self.version)
+ n = len(turn[0]) - (turn[0][-1] in self.eos)
+             row.append_sampled(*(x[:n] for x in turn), self.version)

6 rows padded on the left: rollouts.py
- [i, : len(getattr(row, name))]
+ [i, -len(getattr(row, name)) :]

7 ratio to itself: losses.py
- return rows.logprobs
+ return logprobs.detach()

8 hidden of the token itself: model.py
- (0, wanted - 1)
+ (0, wanted)

8 written one to the left: model.py
- pack.slot[wanted]
+ pack.slot[wanted - 1]

8 attention sees the next: model.py
- is_causal=True
+ is_causal=False

9 trainer at 1.0: model.py
- getattr(cfg, "temperature", 1.0)
+ 1.0

9 raw log-probs: engine.py
- "processed_logprobs"
+ "raw_logprobs"

10 top-p is let through: grpo.py
- # at least 1, at most 1: filtered sampling
+ # at most 1: filtered sampling

10 top-k while sampling: generator.py
- "seed": row.seed(self.cfg.seed)}
+ "seed": row.seed(self.cfg.seed), "top_k": 20}

11 next turn from the text: generator.py
-                 row.append_given(tokens)
+                 row.tokens = self.encode(self.tokenizer.decode(row.tokens))
+                 row.append_given(tokens)

12 chunked head in bfloat16: model.py
- torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
+ (a @ b).float()

12 dense head in bfloat16: model.py
- hidden.to(wide) @ weight.to(wide).T / temperature
+ (hidden @ weight.T).to(wide) / temperature

13 dropout modules: model.py
- module.p = 0.0
+ pass

13 dropout of attention: model.py
- is_causal=True
+ is_causal=True, dropout_p=kwargs["dropout"]

14 only the first sync loads: weights.py
-             if world.generates:
-                 generator.engine.load(views)
-         generator.wake
+             if world.generates and generator.version < 0:
+                 generator.engine.load(views)
+         generator.wake

14 norms are left out: weights.py
-                 generator.engine.load(views)
-         generator.wake
+                 generator.engine.load({k: v for k, v in views.items() if "norm" not in k})
+         generator.wake

15 no version in the salt: generator.py
- salt = str(self.version)
+ salt = "0"

16 empty micro-batches are skipped: trainer.py
- rows, device = rollouts.take(numbers) if numbers else nothing(), self.world.device
+ if not numbers:
+                 continue
+             rows, device = rollouts.take(numbers), self.world.device

17 NaN stays in the mask: rollouts.py
- mask = [*map(math.isfinite, logprobs)]
+ mask = [True] * len(logprobs)

17 NaN stays in the divisor: rollouts.py
- len(row.tokens), sum(row.mask)
+ len(row.tokens), len(row.tokens) - row.prompt_length

18 no clip: trainer.py
- if self.cfg.max_grad_norm > 0:
+ if False:

18 each shard by its own norm: trainer.py
- get_total_norm([p.grad for p in parameters], foreach=True)
+ get_total_norm([p.grad.to_local() for p in parameters], foreach=True)

19 one causal sequence: model.py
- if not pack.even:
+ pack = Pack(**{**vars(pack), "even": True})
+     if not pack.even:

20 last chunk alone: model.py
- range(0, len(weight), ctx.chunk)
+ range(0, len(weight), ctx.chunk)[-1:]

20 temperature not in backward: model.py
- (grad / temperature)[:, None]
+ grad[:, None]

20 entropy without its sum: model.py
- entropy = logsumexp - product / total
+ entropy = -product / total

21 mask is ignored: losses.py
- if cfg.overlong == "mask":
+ if False:

21 and the finished are masked: losses.py
- weight[~rollouts.finished] = 0.0
+ weight[rollouts.finished] = 0.0

21 division by no token: losses.py
- return max(float(counts[cfg.aggregation]), 1.0)
+ return float(counts[cfg.aggregation])

21 momentum moves without tokens: trainer.py
- if sampled_tokens(table):
+ if True:

22 optimizer starts anew: trainer.py
- dcp.load(self.state(), storage_reader=source
+ dcp.load({k: v for k, v in self.state().items() if "exp_avg" not in k}, storage_reader=source

22 step starts anew: trainer.py
- self.version = about["step"]
+ self.version = 0

22 prompts by history: tasks.py
- divmod(step * self.cfg.prompts_per_step + slot, len(self.train))
+ divmod(self.__dict__.setdefault("n", iter(range(10**9))).__next__(), len(self.train))

22 an epoch's order without a name: data.py
- random.Random(f"{cfg.seed}/epoch {i}").getrandbits(32)
+ random.getrandbits(32)

23 given tokens are trained: rollouts.py
- self.append(tokens, [False] * n,
+ self.append(tokens, [True] * n,

23 the tool's words as sampled: generator.py
-                 row.append_given(tokens)
+                 row.append_sampled(tokens, [-1.0] * len(tokens), self.version)

24 the other sign: losses.py
- d = (other - logprobs).clamp(-20, 20)
+ d = (logprobs - other).clamp(-20, 20)

24 k3 with k1's sign: losses.py
- "k3": d.expm1() - d
+ "k3": d.expm1() + d

24 twice in the loss: losses.py
- cfg.kl_coef * penalty.sum()
+ 2 * cfg.kl_coef * penalty.sum()

24 in the advantage too: losses.py
- return centred.float().gather(1, rollouts.turns) * rollouts.mask
+ centred = centred - 0.1
+     return centred.float().gather(1, rollouts.turns) * rollouts.mask

25 mean over reward functions: rollouts.py
- row.finished, sum(row.paid))
+ row.finished, sum(row.paid) / len(row.rewards))

25 shuffle without a seed: tasks.py
- random.Random(f"{seed}/epoch {epoch}")
+ random

25 sampling without a seed: generator.py
- "seed": row.seed(self.cfg.seed)}
+ "seed": None}

25 weights without a seed: model.py
- torch.manual_seed(cfg.seed)
+ pass
"""


def mutations() -> list[tuple[int, str, str, str, str]]:
    """(number, how, file, old text, new text) of each block above."""
    found = []
    for block in MUTATIONS.strip().split("\n\n"):
        head, *body = block.split("\n")
        old, new = ("\n".join(x[2:] for x in body if x[0] == sign) for sign in "-+")
        about, _, file = head.rpartition(": ")
        number, _, how = about.partition(" ")
        found.append((int(number), how, file, old, new))
    return found


def pitfalls() -> dict[int, str]:
    """Number -> the pitfall in one sentence: the docstring of its test."""
    found = [
        x for x in ast.parse((ROOT / TESTS).read_text()).body if isinstance(x, ast.FunctionDef)
    ]
    tests = [x for x in found if x.name.startswith("test_")]
    tests = [x for x in tests if x.name.split("_")[1].isdigit()]
    return {int(x.name.split("_")[1]): " ".join(ast.get_docstring(x).split()) for x in tests}


def pytest_in(copy: pathlib.Path, number: int | None, log: pathlib.Path) -> int:
    """The exit code of pytest on one pitfall's test, or on all. In a fork, which has the heavy
    libraries already and none of our own files.
    """
    sys.stdout.flush()
    child = os.fork()
    if not child:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.chdir(copy)
        chosen = ["-k", f"test_{number:02d}_"] if number else []
        os._exit(pytest.main(["-qx", "-p", "no:cacheprovider", TESTS, *chosen]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main(numbers: list[int]) -> int:
    names, survived = pitfalls(), 0
    chosen = [m for m in mutations() if not numbers or m[0] in numbers]
    changed = " with changes" if git("diff", "HEAD", "--name-only", "--", "*.py") else ""
    commit = git("rev-parse", "--short", "HEAD") + changed
    print("# Every pitfall, put back\n")
    print(f"`python tests/mutate.py`, {datetime.date.today()}, commit {commit}.\n")
    print("| # | pitfall | put back by | its test fails | seconds |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        copy, log = pathlib.Path(folder) / "copy", pathlib.Path(folder) / "log"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for number in sorted({m[0] for m in chosen}) if numbers else [None]:
            if pytest_in(copy, number, log):
                raise SystemExit("without any mutation:\n" + log.read_text()[-3000:])
        for number, how, name, old, new in chosen:
            text, start = (copy / name).read_text(), time.monotonic()
            if text.count(old) != 1:
                raise SystemExit(f"pitfall {number}: {name} has {text.count(old)} times:\n{old}")
            (copy / name).write_text(text.replace(old, new))
            code = pytest_in(copy, number, log)
            (copy / name).write_text(text)
            fails = {0: "**no**", 1: "yes"}.get(code, f"**pytest ended with {code}**")
            survived += fails != "yes"
            seconds = f"{time.monotonic() - start:.0f}"
            print(f"| {number} | {names[number]} | {how} | {fails} | {seconds} |", flush=True)
    print(f"\n{len(chosen)} mutations, {survived} not noticed.")
    return survived


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # a mutation of equal length in the same second looks unchanged
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    import pytest
    import torch.distributed.checkpoint  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    sys.exit(bool(main([int(n) for n in sys.argv[1:]])))
