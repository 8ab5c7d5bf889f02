"""The command line: `resq-rl COMMAND [flags] [overrides]`.

A command is a job (`resq_rl.experiments.cli.commands`) that Hydra makes a folder and composes settings for. This module
turns whatever goes wrong into one line and an exit code: 0 done, 1 a failure that is not the user's, 2 a `ResqError`,
130 interrupted.
"""

import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_rl import __version__
from resq_rl.errors import LaunchError, ResqError, ResultsError, did_you_mean
from resq_rl.experiments.cli.catalogue import KINDS, print_catalogue
from resq_rl.experiments.cli.commands import COMMANDS, RESUME, Command

if TYPE_CHECKING:
    from resq_rl.experiments.tracking.tracker import Status

__all__ = ["main"]

log = logging.getLogger(__name__)

LIST, SYNC = "list", "sync"
JOB_PATIENCE = 120.0  # seconds for its folder, which a network file system keeps locked after its node was lost

USAGE = """\
resq-rl {version}: learned bit allocation for residual-quantized video perception

usage: resq-rl COMMAND [flags] [GROUP=OPTION] [NAME=VALUE] [+experiment=OPTION]
       resq-rl list [KIND]
       resq-rl sync FOLDER [URI]

commands:
{commands}
  {list:{width}}  show what can be chosen: {kinds}
  {sync:{width}}  send what the runs in a folder recorded to an MLflow store that did not get it

flags, after the command:
  --help              its groups, settings and defaults
  --cfg job           print its settings instead of running it (--resolve: with references filled in)
  --multirun          run it once for each combination of values given as NAME=A,B
  --info              where the settings come from

examples:
  resq-rl compare +experiment=demo                 the main job, small: writes report.html
  resq-rl train video=generated training.seeds=[0] training.frames=20000
  resq-rl evaluate policy=results/train/DATE/seed0
  resq-rl train --multirun environment.trade_off=0.06,0.12

cost=NAME or cost=FILE.yaml counts by a cost table of some hardware instead of the product of bit-widths.
Results go to results/COMMAND/DATE; choose another folder with results=FOLDER.
Ctrl-C stops a command and keeps what is done. RESQ_RL_DEBUG=1 shows the traceback of an error, NO_COLOR=1 leaves
out colours; where the output is no terminal there are none."""


def _debugging() -> bool:
    return "1" in (os.environ.get("RESQ_RL_DEBUG"), os.environ.get("HYDRA_FULL_ERROR"))


@dataclass
class _Session:
    """What one invocation has been asked for and has done so far."""

    name: str
    command: Command
    arguments: Sequence[str] = ()
    debug: bool = field(default_factory=_debugging)
    process: int = field(default_factory=os.getpid)
    run_dir: Path | None = None
    failures: list[Exception] = field(default_factory=list)
    interrupted: bool = False

    def report(self, error: Exception, where: str = "") -> None:
        """Print an error as one line; with its traceback for debugging, or for a bug that no log file keeps."""
        if self.debug or (not isinstance(error, ResqError) and self._log_file() is None):
            traceback.print_exception(error)
        else:
            print(f"resq-rl {self.name}: {self.line_of(error)}{where}", file=sys.stderr)

    def line_of(self, error: Exception) -> str:
        """An error in a line; of a bug, with where its traceback is."""
        text = " ".join(str(error).split())
        if isinstance(error, ResqError):
            return text
        text = f"{type(error).__name__}: {text.rstrip('.') or 'no message'}."
        return f"{text} This is a bug; its traceback is in {self._log_file()}."

    def _log_file(self) -> Path | None:
        """The log of the job that ran last, which keeps tracebacks."""
        path = None if self.run_dir is None else self.run_dir / f"{self.name}.log"
        return path if path is not None and path.is_file() else None

    def interruption(self, sweep: Path | None) -> str:
        """What an interrupted command keeps, and how to go on."""
        folder = sweep or self.run_dir
        if folder is None:
            return "interrupted; nothing had started."
        text = f"interrupted; what was computed so far is in {folder}."
        return f"{text} To go on: {self.resumption(folder)}" if sweep or self.command.resume else text

    def resumption(self, folder: Path) -> str:
        """The command that goes on with a run or a sweep."""
        from resq_rl.experiments.config.quoting import assignment

        resume = assignment((self.command.resume or RESUME).partition("=")[0], folder)
        kept = [word for word in self.arguments if not word.startswith(resume.partition("=")[0])]
        return shlex.join(["resq-rl", self.name, *kept, resume])


def main(arguments: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run a command and return the exit code; `arguments` are the process's own by default."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(commands))
        return 0
    if words[0] == "--version":
        print(f"resq-rl {__version__}")
        return 0
    name, rest = words[0], [re.sub("^cost=", "quantization.bops_convention=", word) for word in words[1:]]
    if name == SYNC:
        return _sync(rest)
    if name == LIST:
        return _list(rest)
    if name not in commands:
        what = "Write the command before" if "=" in name or name.startswith("-") else "Unknown command"
        near = did_you_mean(name, [*commands, LIST, SYNC])
        print(f"resq-rl: {what} '{name}'.{near} See resq-rl --help.", file=sys.stderr)
        return 2
    # Read when PyTorch is first imported, which commands do. Idle threads spin shortly and then sleep: those that only
    # spin crawl on shared cores, those that only sleep made a step twice as slow on free ones.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    session = _Session(name, commands[name], arguments=rest)
    return _help(session, rest) if {"-h", "--help"} & set(rest) else _run(session, rest)


def _usage(commands: Mapping[str, Command]) -> str:
    width = max(map(len, (*commands, LIST)))
    lines = [f"  {name:{width}}  {command.help}" for name, command in commands.items()]
    return USAGE.format(
        version=__version__, commands="\n".join(lines), list=LIST, sync=SYNC, width=width, kinds=", ".join(KINDS)
    )


def _sync(arguments: Sequence[str]) -> int:
    """`resq-rl sync`."""
    from resq_rl.experiments.tracking.sync import run

    try:
        run(arguments)
    except ResqError as error:
        print(f"resq-rl {SYNC}: {error}", file=sys.stderr)
        return 2
    return 0


def _help(session: _Session, arguments: Sequence[str]) -> int:
    """`resq-rl COMMAND --help`."""
    from resq_rl.experiments.cli.help import print_help

    command = session.command
    title = f"resq-rl {session.name}: {command.help}"
    title += f"\n\nExample: resq-rl {session.name} {command.example}" if command.example else ""
    try:
        print_help(title, *_composed(session, arguments)[:2], command.groups)
    except ResqError as error:
        session.report(error)
        return 2
    return 0


def _list(kinds: Sequence[str]) -> int:
    """`resq-rl list`; flags are for nothing here, but asking for help is no mistake."""
    if {"-h", "--help"} & set(kinds):
        print(f"resq-rl {LIST} [KIND]: show what can be chosen, of one kind or all: {', '.join(KINDS)}")
        return 0
    try:
        print_catalogue(kinds)
    except ResqError as error:
        print(f"resq-rl {LIST}: {error}", file=sys.stderr)
        return 2
    print("Next: resq-rl compare +experiment=OPTION, or video=OPTION model=OPTION task=OPTION", file=sys.stderr)
    return 0


def _run(session: _Session, arguments: Sequence[str]) -> int:
    from resq_rl.experiments.runs.sweep import end_sweep, invocation

    with invocation() as started:
        try:
            _run_hydra(session, arguments)
        except KeyboardInterrupt:
            session.interrupted = True
            print(f"resq-rl {session.name}: {session.interruption(started.sweep)}", file=sys.stderr)
        except SystemExit as stop:  # raised by the argument parser, by Hydra, and where a folder is taken
            if isinstance(stop.__cause__, ResqError):
                session.report(stop.__cause__)
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception as error:
            if not (session.failures and _system_error(error)):  # else the log ends where the job's own error says
                session.failures.append(_outside_the_job(error, session, arguments, sweeping=started.sweep is not None))
                session.report(session.failures[-1])
        status: Status = "KILLED" if session.interrupted else "FAILED" if session.failures else "FINISHED"
        failed = end_sweep(started, status)
        if started.sweep is not None and not session.interrupted and (failed or session.failures):
            print(f"To run what is missing: {session.resumption(started.sweep)}", file=sys.stderr)
    codes = [_exit_code(error) for error in session.failures] + [job.exit_code for job in failed]
    return 130 if session.interrupted else max(codes, default=0)


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, ResqError) else 1


def _run_hydra(session: _Session, arguments: Sequence[str]) -> None:
    import hydra
    from hydra.core.plugins import Plugins

    from resq_rl.experiments.config.composition import CONFIG_MODULE, VERSION_BASE

    plugins = Plugins.instance()
    from hydra_plugins.resq_rl_ray import RayLauncher

    plugins.register(RayLauncher)  # Hydra finds it in a checkout and a wheel, but not in an editable installation

    def job(config: Any) -> None:
        _guard_job(session, config)

    decorate = hydra.main(
        version_base=VERSION_BASE, config_path=f"pkg://{CONFIG_MODULE}", config_name=session.command.config
    )
    with _process_state(f"resq-rl {session.name}", arguments):
        decorate(job)()


@contextmanager
def _process_state(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """The arguments that Hydra reads and its wish to raise errors instead of printing them; put back afterwards."""
    argv, full_error, complain = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), logging.raiseExceptions
    logging.raiseExceptions = False  # a log file on a full disk must not print a traceback for every line
    sys.argv = [program, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv, logging.raiseExceptions = argv, complain
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
        for handler in logging.getLogger().handlers[:]:
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()


def _guard_job(session: _Session, config: Any) -> None:
    """Run a job; its error is kept and reported, so that the other jobs of a sweep run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from resq_rl.experiments.cli.job import run_job
    from resq_rl.experiments.runs.folders import claimed
    from resq_rl.experiments.runs.record import RunRecord

    hydra_config = HydraConfig.get()
    run_dir = session.run_dir = Path(hydra_config.runtime.output_dir)
    sweeping = hydra_config.mode == RunMode.MULTIRUN
    if os.getpid() != session.process:
        from resq_rl.experiments.runs.sweep import become_worker

        become_worker(run_dir.name)
    overrides, where, record = hydra_config.overrides.task, "", None
    try:
        with ExitStack() as held:
            sweep = None
            if sweeping:  # a run has claimed its folder before Hydra wrote to it
                sweep, where = Path(hydra_config.sweep.dir).absolute(), f" [{' '.join(overrides)}]"
                held.enter_context(claimed(run_dir, JOB_PATIENCE))
            record = RunRecord(run_dir)
            run_job(session.name, session.command, session.arguments, config, record, overrides, sweep)
    except Exception as error:
        log.debug("The job failed.", exc_info=error)
        if record is not None:  # else the folder is another process's
            with suppress(ResultsError):
                record.fail(session.line_of(error), _exit_code(error))
        if not sweeping:  # the jobs of a sweep may run elsewhere: their records tell how they ended
            session.failures.append(error)
        session.report(error, where)


def _outside_the_job(error: Exception, session: _Session, arguments: Sequence[str], *, sweeping: bool) -> Exception:
    """What to report for an error of Hydra's, from before a job began."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from resq_rl.experiments.config.composition import COMPOSITION_ERRORS, explain

    system_error = _system_error(error)
    if system_error is not None:
        return ResultsError(
            f"Cannot write the results folder{_named(system_error)}: {system_error.strerror}. "
            "Choose a writable one with results=FOLDER."
        )
    if sweeping and not isinstance(error, ResqError | HydraException | OmegaConfBaseException):
        return LaunchError(f"The launcher of the sweep stopped: {type(error).__name__}: {str(error).split('. ')[0]}.")
    if not isinstance(error, COMPOSITION_ERRORS):
        return error
    name, overrides, multirun = _composed(session, arguments)
    explained = explain(error, name, overrides, multirun=multirun)
    explained.__cause__ = error
    return explained


def _composed(session: _Session, arguments: Sequence[str]) -> tuple[str, list[str], bool]:
    """Of which config and overrides the settings are composed, and whether those may give several values."""
    from hydra._internal.utils import get_args_parser

    from resq_rl.experiments.config.quoting import readable

    flags = get_args_parser().parse_args(list(arguments))
    overrides = list(flags.overrides)
    if flags.config_dir is not None and Path(flags.config_dir).is_dir():
        searchpath = readable(f"hydra.searchpath=[file://{Path(flags.config_dir).absolute()}]")
        overrides += [] if searchpath is None else [searchpath]
    return flags.config_name or session.command.config, overrides, flags.multirun


def _named(error: OSError) -> str:
    return "" if error.filename is None else f" {error.filename}"


def _system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind `error`, if there is one; Hydra's own kinds have no number."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
