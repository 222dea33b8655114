"""`deepspeed launch/eval.py --config RECIPE [section.key=value ...]`: the eval verb on every rank."""

import sys

from shoal.launch import main

if __name__ == "__main__":
    main(["eval", *sys.argv[1:]])
