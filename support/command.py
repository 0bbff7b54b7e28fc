"""How train.py begins, and how it ends when something goes wrong: with one line and exit status 2, no traceback."""

import argparse
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

from support import checkpoints, folders, processes
from support.checkpoints import CheckpointError
from support.datasets import build_datasets, check_unchanged, describe
from support.image_files import DataError
from support.loaders import WORKER_DIED, is_death_of_a_worker
from support.model import load_model, weights_to_begin_with
from support.options import check_network, explain, parse, tiles_each
from support.run import STATE, Diverged
from support.sizes import check_sizes


def prepare_run(arguments: list[str] | None, parser) -> tuple[dict, Path, dict | None]:
    """Reads the options, claims the folder of the run, and looks at all images before anything is written there.

    Returns the configuration, the folder of the run, and what its last.pt holds if the run goes on.
    Ends the program, or raises DataError or CheckpointError, if they do not fit together.
    """
    asked = parse(arguments, parser)
    if asked["resume"]:
        return resume_run(asked, parser)
    return begin_run(asked)


def begin_run(asked: dict) -> tuple[dict, Path, None]:
    """A new run, with what `prepare_run` returns. asked: its options."""
    check_processes(asked)
    out = claim_folder(asked)
    try:
        config = asked | describe(asked)
        if config.get("init"):
            print_init(config)
    except BaseException:  # also Ctrl-C
        folders.give_back(out)
        raise
    return config | {"out": str(out)}, out, None


def resume_run(asked: dict, parser) -> tuple[dict, Path, dict]:
    """A run that goes on, with what `prepare_run` returns. asked: the options that were given with --resume."""
    out = folder_of_run(Path(asked["resume"]))
    if not folders.hold(out):
        raise DataError(f"{out}: another program is training this run; wait until it ends, or stop it")
    try:
        return check_resumed(asked, out, parser)
    except BaseException:
        folders.give_back(out)
        raise


def check_resumed(asked: dict, out: Path, parser) -> tuple[dict, Path, dict]:
    """What `resume_run` returns. DataError, CheckpointError: the run cannot go on."""
    config, _, state = open_run(out)
    if "changes" in asked:
        change_options(config, asked["changes"], parser)
    else:
        check_same(asked, config, out)
    check_processes(config)
    if config["dataset"] != "synthetic" and not Path(config["data"]).is_dir():
        raise DataError(f"--data {config['data']}: no such folder; give --data with the folder in which the images of "
                        f"{out} lie now")
    check_sizes(config, {tuple(config["image_size"]): str(out)}, len(build_datasets(config)["train"]))
    check_unchanged(config)
    done = len(state["rows"])
    line = f"{out}: {done} of {config['epochs']} epochs are done"
    if done == config["epochs"]:
        line += "; to train longer, begin a new run with its weights: --init"
    print(line)
    return config, out, state


def claim_folder(asked: dict) -> Path:
    """The folder of a new run, which belongs to it alone even before the long look at all images.

    DataError: it cannot be written, is not empty, or belongs to another run.
    """
    if asked["out"] is not None:
        out = Path(asked["out"])
        folders.check_folder(out)
    else:
        rows, columns = asked["grid"]
        name = f"runs/{asked['dataset']}-{rows}x{columns}-k{asked['comm_channels']}-seed{asked['seed']}"
        folders.check_folder(Path(name))
        out = folders.new_folder(name)
    folders.claim(out)
    return out


def open_run(out: Path) -> tuple[dict, Path, dict]:
    """The configuration, the folder, and the content of last.pt, of a run that is to go on.

    out: the folder, or a file in it. CheckpointError: there is no last.pt, or it cannot be used.
    """
    out = folder_of_run(out)
    path = out / "last.pt"
    state = checkpoints.load(path, STATE)
    _, config = load_model(path)  # which also finds out whether the weights fit
    config.setdefault("freeze_batch_norm", 1.0)  # a run that was begun before there was this option
    config.setdefault("workers", None)
    config.setdefault("class_weights", None)
    config.setdefault("init", None)
    config.setdefault("image_processes", 1)
    return config, out, state


def folder_of_run(out: Path) -> Path:
    """The folder of a run. out: the folder, or a file in it. CheckpointError: there is no last.pt."""
    if out.is_file():
        out = out.parent
    if not (out / "last.pt").is_file():
        raise CheckpointError(f"{out}: this folder holds no last.pt; name the folder of a run, runs/NAME")
    return out


def change_options(config: dict, changes: dict, parser):
    """What is given with --resume takes the place of what the run was begun with. DataError: the
    run has no such data."""
    config.update(changes)
    if "data" in changes:
        if config["dataset"] == "synthetic":
            raise DataError(f"--data {config['data']}: the images of this run are synthetic; leave --data out")
        config["data"] = str(config["data"].absolute())
    if "image_processes" in changes:  # now each of them may have another number of tiles for its GPUs
        config["gpus"] = min(processes.gpus_each(), tiles_each(config))
        check_network(config, parser)


def print_init(config: dict):
    """What --init does. CheckpointError: it cannot be done."""
    _, classes = weights_to_begin_with(Path(config["init"]), config)
    line = f"the run begins with the weights of {config['init']}"
    if classes != config["classes"]:
        line += f"; its classes are others ({', '.join(classes)}), so the last layer is drawn anew"
    print(line)


def check_same(asked: dict, config: dict, out: Path):
    """After a restart by torchrun --max-restarts all options are given again. DataError: they are
    those of another run."""
    other = []
    for name, value in asked.items():
        if name in ("resume", "out", "workers") or (name == "image_size" and config["dataset"] != "synthetic"):
            continue
        if value != config[name]:
            other.append(name)
    if other:
        raise DataError(f"--out {out}: holds a run with another {', another '.join(other)}; name another --out")


def check_processes(config: dict):
    """DataError: the processes that torchrun has started do not go with the options."""
    started, each = processes.world_size(), config["image_processes"]
    if started % each != 0:
        raise DataError(f"--image-processes {each}: the number of processes is {started}, which is not a multiple of "
                        "it; start others, with torchrun --nproc-per-node, or take another --image-processes, 1 for a "
                        "single process")
    groups = started // each
    if config["batch_size"] < groups:
        raise DataError(f"--batch-size {config['batch_size']}: {groups} processes, or groups that share an image, need "
                        f"at least as many images; let the processes share each image (--image-processes {started}), "
                        "or take a larger --batch-size, for images of several sizes with --crop")


@contextmanager
def one_line_errors(parser: argparse.ArgumentParser, config: dict | None = None, out: Path | None = None):
    """Inside, what a user can mend ends the program with one line that tells how, and exit status 2.

    config, out: the options and the folder of the run, once they are known. The folder is taken
    away again if nothing was written to it.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped{how_to_go_on(out)}\n" if processes.is_first() else None)
    except Diverged as error:
        parser.error(f"{error}: the likely cause is --lr {config['lr']}, take a smaller one; {out} holds what was "
                     "saved before")
    except (DataError, CheckpointError) as error:
        parser.error(str(error))
    except BrokenPipeError:
        close_output()
        parser.error("nobody reads what this prints any more, so it stops" + how_to_go_on(out))
    except OSError as error:
        parser.error(explain(error, out or Path()))
    except (RuntimeError, MemoryError) as error:
        if is_death_of_a_worker(error):
            parser.error(WORKER_DIED)
        if processes.is_lost(error):
            parser.error(f"process {processes.rank()}: another one has ended, so this one stops" + how_to_go_on(out))
        if config is None or not processes.is_out_of_memory(error):
            raise
        parser.error(f"out of memory; this tells what would fit: python plan.py --run {shlex.quote(str(out))} "
                     f"--memory {processes.memory_gib():.3g}")
    finally:
        if out is not None and processes.is_first():
            folders.give_back(out)


def how_to_go_on(out: Path | None) -> str:
    """The end of a line about a run that stops. out: its folder, if it is known."""
    if out is None or not (out / "last.pt").exists():
        return "; nothing is lost"
    program = "torchrun ... train.py" if processes.world_size() > 1 else "python train.py"
    return f"; go on with: {program} --resume {shlex.quote(str(out))}"


def close_output():
    """Nothing more is printed, also not at the end of the program, when Python prints what is left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
