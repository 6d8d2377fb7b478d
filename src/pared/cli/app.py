"""The commands, and how they end: exit status 0 done, 2 wrong use, 130 stopped, 1 anything else.

Everything heavy is imported inside the command that needs it; `work` and `show` do what the commands say.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from pared.errors import ParedError, UsageError

STOPPED = 130
Data = Literal["embedded", "full"]
Table = Literal["steps", "targets", "models", "data"]

app = typer.Typer(
    help="Make a trained PyTorch network smaller and faster, with the proof measured on the file that ships.",
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would take a fifth of a second to import
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("pared")
        except metadata.PackageNotFoundError:
            version = "unknown, for it is not installed"
        typer.echo(f"pared {version}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the whole traceback of an error, as PARED_TRACEBACK=1 does.")
    ] = False,
) -> None:
    """Say what there is where no command is given."""
    if verbose:
        os.environ["PARED_TRACEBACK"] = "1"
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe, YAML or JSON.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the artifact; runs/<name of the recipe> by default.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which layers would change, which would not, and why.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the artifact in the folder.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change an entry: steps.1.QuantizeStatic.ranges=percentile."),
    ] = None,
    data: Annotated[Data | None, typer.Option(help="Which data an embedded task reads.")] = None,
) -> None:
    """Compress a model by a recipe; print the ledger and the path of the report."""
    from pared.recipe import Recipe

    read = Recipe.read(recipe, [*(changes or ()), *([f"data={data}"] if data else ())])
    from pared.cli import work  # it imports torch, which an unreadable recipe need not wait for

    if dry_run:
        work.plan(read, folder=recipe.parent)
        return
    out = out or Path("runs") / recipe.stem
    work.run(read, folder=recipe.parent, out=out, resume=resume, overwrite=overwrite)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the artifact; an older demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    data: Annotated[Data, typer.Option(help="The images that ship with pared, or the full set on disk.")] = "embedded",
) -> None:
    """Train a small network on Fashion-MNIST, compress it to int8, and print what that gained and cost."""
    from pared.cli import work
    from pared.recipe import Recipe

    recipe = Recipe.read(Path(__file__).parents[1] / "demo.yaml", [f"data={data}"])
    work.demo(recipe, out=out)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help="module:callable, file.py:callable, a zoo name, or a recipe.", show_default=False),
    ],
    weights: Annotated[Path | None, typer.Option(help="Weights: safetensors or a plain checkpoint.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="N,C,H,W", help="Shape of a float input; once for each input.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task whose example inputs to use: module:callable, file.py:callable or a name.")
    ] = None,
) -> None:
    """List a model's layers: shapes, parameters, multiply-accumulates, and what each technique could touch."""
    from pared.cli import work

    work.inspect(model, weights=weights, shapes=shape or [], task=task)


@app.command()
def bench(
    files: Annotated[
        list[Path],
        typer.Argument(help="Artifact folders or exported files; the first is the baseline.", show_default=False),
    ],
    target: Annotated[str, typer.Option(help="The runtime that opens them.")] = "onnxruntime",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one call.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; every usable core by default.")
    ] = None,
    dimension: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SIZE", help="Size of another free dimension.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open files that carry code; say so only of files you trust.")
    ] = False,
) -> None:
    """Time exported files in turn, each in a process of its own, and say which is faster."""
    from pared.cli import show
    from pared.targets.bench import bench as time_files

    sizes = dict(dimension_of(text) for text in dimension or ())
    rows = time_files(files, target=target, batch_size=batch_size, threads=threads, dimensions=sizes, trust=trust)
    show.print_bench(rows)


def dimension_of(text: str) -> tuple[str, int]:
    """The name and size in `NAME=SIZE`. Raises: UsageError."""
    name, _, size = text.partition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise UsageError(f"--dimension {text}: write NAME=SIZE, e.g. sequence=128")
    return name, int(size)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Artifact folder.", show_default=False)],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write report.html anew from report.json.")] = False,
) -> None:
    """Print an artifact's ledger."""
    from pared.cli import show
    from pared.report.data import Report

    found = Report.read(folder)
    show.print_report(found)
    if rebuild:
        from pared.report.html import write_html

        page = (folder if folder.is_dir() else folder.parent) / "report.html"
        write_html(found, page)
        typer.echo(f"\nreport: {page}")


@app.command("list")
def list_(
    what: Annotated[Table, typer.Argument(help="What to list.", show_default=False)],
) -> None:
    """List the steps with their settings, the targets, the models or the data that come with pared."""
    from pared.cli import show

    show.LISTS[what]()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(args=given, prog_name="pared", standalone_mode=False)
    except typer.TyperException as error:
        return fail(error, error.format_message(), 2)
    except ParedError as error:
        return fail(error, str(error), error.exit_status)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return fail(error, f"{error.strerror or error}{where}", 1)
    # Typer turns Ctrl-C into an exit with this status.
    if status == STOPPED:
        how = "; go on with --resume" if given[:1] == ["run"] else ""
        typer.echo(f"stopped{how}", err=True)
    return status if isinstance(status, int) else 0


def fail(error: Exception, message: str, status: int) -> int:
    """Say in one line what is wrong; raise instead where the whole traceback is wanted."""
    if os.environ.get("PARED_TRACEBACK"):
        raise error
    notes = getattr(error, "__notes__", [])
    typer.echo("error: " + "; ".join(" ".join(text.split()) for text in [message, *notes]), err=True)
    return status
