"""`deepspeed launch/distill.py --config RECIPE [section.key=value ...]`: the distill verb on every rank."""

import sys

from shoal.launch import main

if __name__ == "__main__":
    main(["distill", *sys.argv[1:]])
