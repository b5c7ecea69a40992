"""What makes the environments in which tools/dev.py runs all else; standard library only."""
