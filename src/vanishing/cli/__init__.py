"""The command line, one command a file."""

import typer

from vanishing.cli import compress, demo, inspect, recipe

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Compress PyTorch models while they are fine-tuned."""


app.command("compress")(compress.run)
app.command("inspect")(inspect.run)
app.command("recipe")(recipe.run)
app.command("demo")(demo.run)
