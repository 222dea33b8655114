"""`deepspeed launch/measure.py --config RECIPE [section.key=value ...]`: the measure verb on every rank."""

import sys

from shoal.launch import main

if __name__ == "__main__":
    main(["measure", *sys.argv[1:]])
