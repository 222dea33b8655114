"""`deepspeed launch/record.py --config RECIPE [section.key=value ...]`: the record verb on every rank."""

import sys

from shoal.launch import main

if __name__ == "__main__":
    main(["record", *sys.argv[1:]])
