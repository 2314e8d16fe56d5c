"""`python -m vanishing`: the same as the command `vanishing`."""

from vanishing.cli import app

app(prog_name="vanishing")
