"""The `splitinfer` command: its subcommands put together, and the one border where errors become exit codes.

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted, 143 terminated. Nothing here or in the
command modules imports torch or numpy before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from splitinfer import __version__
from splitinfer.cli import bench, cert, chat, demo, generate, node, plan, shard, verify
from splitinfer.cli.console import INTERRUPTED, prepare_threads, print_error, report

__all__ = ["main", "make_app"]

# typer keeps its parser's exceptions to itself; the root of them is an ancestor of one that it does export.
_ParserError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

_EPILOG = """
[bold]Examples[/bold]
  splitinfer node --experts 0-31                   hold half of the demo model
  splitinfer generate "import os" --nodes a:7077   with its experts there
  splitinfer chat path/to/gemma                    a model on this machine
  splitinfer plan gemma-4-26b-a4b --node a=16GiB --quant int4
  splitinfer bench --rtt                           what a link to nodes costs

Settings come from the command line, then the environment
(SPLITINFER_MODEL, SPLITINFER_NODES, ...), then splitinfer.toml, here or in
~/.config/splitinfer. --debug may stand anywhere on the line.
"""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"splitinfer {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set SPLITINFER_DEBUG=1).")
    ] = False,
) -> None:
    """Run a Gemma mixture of experts across machines: attention here, experts on nodes."""


def make_app() -> typer.Typer:
    """The whole command line, without the border that `main` adds."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=_EPILOG)(_root)
    for module in (node, generate, chat, plan, shard, verify, bench, cert, demo):
        app.command(module.__name__.rpartition(".")[2], epilog=module.EPILOG)(module.command)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); the exit code. Prints errors, never raises them."""
    arguments, debug = _take_debug(list(sys.argv[1:] if argv is None else argv))
    debug = debug or os.environ.get("SPLITINFER_DEBUG", "").lower() not in ("", "0", "false", "no")
    prepare_threads()
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        code = make_app()(args=arguments, prog_name="splitinfer", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BrokenPipeError:
        return _reader_left()
    except _ParserError as error:
        return _report_usage(error)
    except Exception as error:
        return report(error, debug=debug)
    finally:
        signal.signal(signal.SIGTERM, before)
    if code == INTERRUPTED:
        print(file=sys.stderr)  # the terminal has echoed ^C; what follows starts on its own line
    return code if isinstance(code, int) else 0


def _leave(number: int, _: FrameType | None) -> None:
    """Unwind at SIGTERM as at Ctrl-C, so that connections and processes started here are closed."""
    raise SystemExit(128 + number)


def _take_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Take `--debug` from wherever it stands before `--`: it belongs to the program, not to one command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


def _report_usage(error: Any) -> int:
    """A command line that the parser refused, in the same two lines as every other error."""
    message = error.format_message().strip()
    if type(error).__name__ == "NoArgsIsHelpError":
        return int(error.exit_code)  # the help has been printed
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "splitinfer"
    message = message[:1].lower() + message[1:].removesuffix(".")
    print_error(message, f"See `{command} --help`.")
    return int(error.exit_code)


def _reader_left() -> int:
    """Standard output is a pipe whose reader left (`| head`): nothing to say, and nobody to say it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
