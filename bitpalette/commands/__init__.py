"""One module a command; each adds itself to the typer application with `register`."""
