"""Parts of a run: what is trained, estimated, updated and written down."""
