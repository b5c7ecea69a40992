"""A Hugging Face model -> masks of its most sensitive weights (torch)."""
