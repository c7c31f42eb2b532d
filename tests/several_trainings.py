"""Several trainings in one process per rank, since starting Python and torch takes longer than they do.

`mpirun -np N python -m tests.several_trainings '[["--steps", "5"], ...]'`: the flags of each, as JSON. Ends with the
status of the first that does not end with 0.
"""

import json
import sys

from allreduce_sgd.train import main

if __name__ == "__main__":
    for flags in json.loads(sys.argv[1]):
        status = main(flags)
        if status != 0:
            sys.exit(status)
