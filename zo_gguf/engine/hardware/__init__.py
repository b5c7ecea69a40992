"""What llama.cpp, as it was built, can do on this machine."""
