"""`python -m simsiam`."""

import os
import sys

from simsiam.commands.main import main

if __name__ == "__main__":  # not in a process that multiprocessing spawns
    code = main()
    if "RANK" in os.environ:
        # Under torchrun, gloo's threads may outlive the interpreter and abort it
        # (pytorch issue 190489).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
