#!/bin/sh
# Everything that is run on a GPU, in one call of under nine minutes: bench/on_gpu.sh [--dry] [OUT]
cd "$(dirname "$0")/.." && exec python3 bench/on_gpu.py "$@"
