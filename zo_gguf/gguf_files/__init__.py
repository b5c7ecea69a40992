"""GGUF files as bytes; knows no engine."""
