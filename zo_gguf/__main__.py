"""`python -m zo_gguf` is `zo-gguf`."""

import sys

from zo_gguf.cli import main

sys.exit(main())
