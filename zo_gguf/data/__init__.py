"""Data files -> rows -> examples: token ids, and which of them count."""
