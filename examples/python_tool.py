"""A tool that runs the model's Python: in bubblewrap, or not at all. A file to copy.

    torchrun --nproc_per_node=3 grpo.py --task=examples/python_tool.py:PythonTool \
        --model=Qwen/Qwen3-0.6B --max_new_tokens=512 --max_prompt_tokens=128

The policy may write `run: print(63*11)$`; the environment goes on with what the program printed.
`$` ends the call because no Python program needs it outside a string.

A program sees a read-only /usr, an empty /tmp and nothing else: no network, no file of the run,
no variable, no other process. It ends after some seconds, with all that it has started. What
bubblewrap does not hide is the kernel: see SECURITY.md.
"""

import functools
import itertools
import os
import pathlib
import random
import re
import shutil
import subprocess
import threading

import tasks
from runtime import UserError

SECONDS = 5.0  # of wall clock
MEMORY, DISK = 512 * 2**20, 16 * 2**20  # bytes of a process; of /tmp, which is memory too
PROCESSES, FILES, OUTPUT = 16, 64, 4096  # at once; open; bytes of output that are read
NOBODY = 65534  # root's processes have no limits, so root's programs run as this user

# Runs inside, before the program: hard limits, which it cannot raise.
LIMITED = f"""
import resource, sys
for name, most in dict(AS={MEMORY}, NPROC={PROCESSES}, NOFILE={FILES}, FSIZE={DISK},
                       CPU={int(SECONDS) + 1}, CORE=0).items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {{"__name__": "__main__"}})
"""


def command() -> list[str]:
    """How a program is run. UserError where it cannot be run safely."""
    bwrap, python = (shutil.which(name, path="/usr/bin:/bin") for name in ("bwrap", "python3"))
    python = python or shutil.which("python3", path="/usr/local/bin")
    if not bwrap or not python:
        missing = "bubblewrap (apt-get install bubblewrap)" if not bwrap else "a python3 in /usr"
        raise UserError(f"the Python tool runs nothing without {missing}")
    system = []
    for name in ("bin", "lib", "lib32", "lib64"):  # links into /usr, or folders of their own
        path = pathlib.Path("/", name)
        if path.is_symlink():
            system += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            system += ["--ro-bind", str(path), str(path)]
    return [
        *(bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"),
        *("--ro-bind", "/usr", "/usr", *system, "--proc", "/proc", "--dev", "/dev"),
        *("--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *("--remount-ro", "/dev", "--remount-ro", "/"),  # both are memory, without a limit
        *(python, "-I", "-S", "-c", LIMITED),
    ]


def run_python(code: str) -> str:
    """What a program prints, errors too; at most OUTPUT bytes in at most SECONDS."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    who = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    with subprocess.Popen(command(), **pipes, **who, env={}, cwd="/") as process:
        alarm = threading.Timer(SECONDS, process.kill)  # bubblewrap's end is the end of all in it
        alarm.start()
        try:
            process.stdin.write(code.encode(errors="replace"))
            process.stdin.close()
            printed = process.stdout.read(OUTPUT)
        except BrokenPipeError:
            printed = b""
        finally:
            process.kill()
            alarm.cancel()
            process.stdin = None  # it is closed, or nobody reads it any more
    return printed.decode(errors="replace")


@functools.cache
def check_sandbox():
    """UserError if programs cannot run here, for instance in a container without namespaces."""
    if (printed := run_python("print(6 * 7)").strip()) != "42":
        raise UserError(f"bubblewrap does not work here: {printed[:200]}")


class PythonTool(tasks.Task):
    """Sums that are long by hand and short in Python."""

    system = "Write `run: PROGRAM$` to run a Python program; then give the answer as `#number`."
    stop = "$"

    def __init__(self, cfg):
        super().__init__(cfg)
        check_sandbox()
        examples = []
        for n, m in itertools.product(range(10, 100), range(3, 10)):
            total = sum(k**m for k in range(1, n + 1))
            examples.append({"prompt": f"Sum of k**{m} for k from 1 to {n}?", "answer": total})
        random.Random("python_tool").shuffle(examples)
        self.train, self.heldout = examples[128:], examples[:128]

    def reply(self, episode: tasks.Episode) -> str | None:
        """The output of the program that the turn ended with; None if there is none."""
        call = re.search(r"run:(.*)\$$", episode.turns[-1], re.DOTALL)
        return f"\n{run_python(call[1].strip())}\n" if call else None

    def correct(self, episode: tasks.Episode) -> float:
        """1 if the last `#number` of the policy's last turn is the answer, else 0."""
        found = re.findall(r"#(-?\d+)", episode.turns[-1])
        return float(bool(found) and found[-1] == str(episode.problem["answer"]))
