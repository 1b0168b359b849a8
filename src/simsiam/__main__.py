import os
import sys

from simsiam.commands.main import main

if __name__ == "__main__":  # and not in a process that spawns from this one
    code = main()
    if (
        "RANK" in os.environ
    ):  # one of several: gloo's threads may outlive the interpreter and abort (pytorch issue 190489)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
