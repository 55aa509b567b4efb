"""Where metrics go besides the run folder: --log_to=tensorboard,wandb,trackio opens these."""

import importlib


def open_sink(name: str, run, first: int):
    """(log(line), close()) of a sink, whose package is imported here and nowhere else."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run.folder / name, purge_step=first, flush_secs=10)
        add = lambda line, name: board.add_scalar(name, line[name], line["step"])  # noqa: E731
        return lambda line: [add(line, k) for k in line if k != "step"], board.close
    sink, about = importlib.import_module(name), {"name": run.folder.name, "config": vars(run.cfg)}
    if name == "trackio":
        sink.init(project="nanoforge", **about)
        return lambda line: sink.log(line, step=line["step"]), sink.finish
    # Metrics and settings go there: no console, code, git state, machine or list of packages.
    off = dict.fromkeys(("disable_code", "disable_git", "x_disable_meta", "x_disable_stats"), True)
    quiet = sink.Settings(console="off", x_save_requirements=False, **off)
    sink.init(project="nanoforge", dir=str(run.folder), settings=quiet, **about)
    sink.define_metric("*", step_metric="step")  # its own refuses an evaluation that comes later
    return sink.log, sink.finish
