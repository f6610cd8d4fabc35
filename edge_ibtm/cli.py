"""The command line: parse, call, print. Errors become one line and an exit code; `--debug` keeps the traceback.

Exit codes: 0 done, 1 a stage or a gate failed, 2 the request was wrong, 130 interrupted. Nothing heavy is imported
before a command needs it.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module

import typer

from edge_ibtm.errors import EdgeIBTMError

app = typer.Typer(
    name="edge-ibtm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Token merging that fits vision transformers to phones. Any command takes --debug: tracebacks and warnings.",
)
PARTS = ("cli_compress", "cli_list", "cli_recipe", "cli_targets", "cli_train", "cli_phone")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    """Token merging that fits vision transformers to phones."""
    if version:
        from edge_ibtm import __version__

        typer.echo(f"edge-ibtm {__version__}")
        raise typer.Exit()


for _part in PARTS:
    import_module(f"edge_ibtm.{_part}").register(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `edge-ibtm`; leaves through SystemExit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    if debug:
        os.environ["EDGE_IBTM_DEBUG"] = "1"  # for worker processes
    else:
        _quiet()
    try:
        app(given, prog_name="edge-ibtm")
    except SystemExit as leave:
        if leave.code == 130:
            _say(_interrupted(given))
        raise
    except KeyboardInterrupt:
        _say(_interrupted(given))
        sys.exit(130)
    except EdgeIBTMError as err:
        if debug:
            raise
        _say(f"error: {err}")
        sys.exit(err.exit_code)
    except MemoryError:
        if debug:
            raise
        _say("error: out of memory; lower lower.jobs, batch sizes or the image size")
        sys.exit(1)
    except OSError as err:
        if debug:
            raise
        _say(f"error: {explain(err)}")
        sys.exit(1)
    except Exception as err:
        if debug:
            raise
        text = (str(err).strip().splitlines() or [""])[0]
        _say(f"error: {type(err).__name__}: {text[:300]} (run again with --debug for the traceback)")
        sys.exit(1)


def explain(err: OSError) -> str:
    """One line for an operating system error: what, where, what to do."""
    where = f" at {err.filename!r}" if err.filename else ""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device{where}; free some or choose another --out, then run the same command again"
    if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to read or write{where} ({err.strerror}); change its permissions, or choose another --out"
    return f"{err.strerror or err}{where}"


def _interrupted(given: list[str]) -> str:
    resumes = given[:1] in (["compress"], ["train"])
    return "interrupted; the same command resumes where it stopped" if resumes else "interrupted"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _quiet() -> None:
    """Keep the libraries' warnings off the screen."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


if __name__ == "__main__":
    main()
