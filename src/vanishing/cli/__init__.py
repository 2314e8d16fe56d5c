"""The command line, one command a file."""

import typer

from vanishing.cli import demo

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _root() -> None:
    """Compress PyTorch models while they are fine-tuned."""


app.command("demo")(demo.run)
