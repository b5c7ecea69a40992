"""llama.cpp with libzo beside it; the only package that imports llama_cpp."""
