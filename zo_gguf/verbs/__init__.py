"""One module per command; `tune` is the one to read first."""
