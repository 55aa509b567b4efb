"""Programs that try to break out of examples/python_tool.py. What a model writes, someone ran."""

import os
import socket
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import python_tool

import tasks
from runtime import UserError

try:
    python_tool.check_sandbox()
    WHY = ""
except UserError as error:
    WHY = str(error)
sandboxed = pytest.mark.skipif(bool(WHY), reason=WHY)


@sandboxed
def test_it_runs_programs():
    assert python_tool.run_python("print(sum(k**3 for k in range(10)))") == "2025\n"
    assert "ZeroDivisionError" in python_tool.run_python("1/0")
    assert python_tool.run_python("open('a', 'w').write('x'); print(open('a').read())") == "x\n"
    assert python_tool.run_python("print(open('a').read())").count("FileNotFound") == 1  # anew


@sandboxed
def test_no_file_and_no_variable_of_the_run(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("gold")
    monkeypatch.setenv("HF_TOKEN", "gold")
    code = f"import os; print(os.environ); print(os.listdir('/')); print(open({str(secret)!r}))"
    said = python_tool.run_python(code)
    assert "gold" not in said and "FileNotFoundError" in said
    for name in ("root", "home", "etc", "work", "var"):
        assert f"'{name}'" not in said
    for place in ("/usr/x", "/x", "/dev/x", "/dev/shm/x"):
        assert "Error" in python_tool.run_python(f"open({place!r}, 'w')"), place
    code = "import os, glob; print(len([p for p in glob.glob('/proc/[0-9]*')]))"
    assert int(python_tool.run_python(code)) <= 3  # bubblewrap and itself: no one else's environ
    fds = python_tool.run_python("import os; print(os.listdir('/proc/self/fd'))")
    assert fds.count("'") <= 8  # nothing of ours is open in there


@sandboxed
def test_no_socket_reaches_anyone():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('in')"
        said = python_tool.run_python(code)
    assert "Error" in said and "in\n" not in said
    assert python_tool.run_python("import socket; print(socket.if_nameindex())") == "[(1, 'lo')]\n"


@sandboxed
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = bytearray(2**30)", "MemoryError"),
        ("f = open('a', 'wb')\nfor _ in range(64): f.write(bytes(2**20)); f.flush()", "Error"),
        ("fs = [open(f'{i}', 'w') for i in range(999)]", "Too many open files"),
        (
            "for i in range(99): open(f'{i}', 'wb').write(bytes(2**20))",
            "No space left on device",
        ),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "Error"),
    ],
)
def test_memory_disk_and_files_have_limits(code, sentence):
    assert sentence in python_tool.run_python(code)


@sandboxed
def test_a_fork_bomb_ends(monkeypatch):
    monkeypatch.setattr(python_tool, "SECONDS", 2.0)
    before, start = len(psutil.pids()), time.monotonic()
    python_tool.run_python("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert time.monotonic() - start < 5
    time.sleep(0.5)
    assert len(psutil.pids()) < before + python_tool.PROCESSES
    code = "import os\nn = 0\ntry:\n    while os.fork(): n += 1\nexcept OSError: print(n)"
    said = python_tool.run_python(code + "\nos._exit(0)")
    assert said == "" or int(said.split()[0]) < python_tool.PROCESSES


@sandboxed
def test_output_and_time_end(monkeypatch):
    assert len(python_tool.run_python("while True: print('x' * 999)")) == python_tool.OUTPUT
    monkeypatch.setattr(python_tool, "SECONDS", 1.0)
    start = time.monotonic()
    assert python_tool.run_python("while True: pass") == ""
    sleeper = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(4217)"
    assert python_tool.run_python(sleeper) == ""
    assert time.monotonic() - start < 4
    for process in psutil.process_iter(["cmdline"]):  # the child in its own session has gone too
        assert "4217" not in " ".join(process.info["cmdline"] or ())


@sandboxed
def test_signals_reach_nobody():
    code = "import os\nfor p in range(1, 40000):\n    try: os.kill(p, 9)\n    except OSError: pass"
    python_tool.run_python(code + f"\nos.kill({os.getpid()}, 9)")
    assert "Error" in python_tool.run_python(f"import os; os.kill({os.getppid()}, 0)")


@sandboxed
def test_the_task():
    task = python_tool.PythonTool(SimpleNamespace(seed=0, prompts_per_step=4))
    problem = task.train[0]
    program = f"run: print(sum({problem['prompt'].split()[2]} for k in range(1, 2)))$"
    episode = tasks.Episode(problem, [program])
    assert task.reply(episode) == "\n1\n\n" and task.reply(tasks.Episode(problem, ["no"])) is None
    right = tasks.Episode(problem, [program, "1", f"so #{problem['answer']}"])
    assert task.correct(right) == 1 and task.correct(episode) == 0


def test_without_bubblewrap_nothing_runs(monkeypatch):
    monkeypatch.setattr(python_tool.shutil, "which", lambda name, path: None)
    with pytest.raises(UserError, match="apt-get install bubblewrap"):
        python_tool.run_python("print(1)")
