"""A delta -> one GGUF for stock apps, and what of it survived."""
