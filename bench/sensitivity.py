"""Sensitivities of a model's weights, one JSON line: seconds, sum of alpha, the largest; and with --noise, lines that
set the Fisher trace beside the KL divergence that noise of that energy causes.

    python bench/sensitivity.py MODEL --text valid.txt --tokens 2048 --seq-len 256
    python bench/sensitivity.py MODEL --text valid.txt --noise 0.005 0.03 --weights layers.11.mlp.down_proj
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from bitpalette.calibrate.noise_sensitivity import noise_sensitivities
from bitpalette.calibrate.plan import Rule
from bitpalette.calibrate.sensitivity import fisher_sensitivities
from bitpalette.calibrate.skeleton import DTYPES, Skeleton
from bitpalette.calibrate.structure import quantizable
from bitpalette.calibrate.text import Calibration, sequences
from bitpalette.calibrate.whole import load_tokenizer
from bitpalette.formats.base import open_source
from bitpalette.formats.sensitivity_file import Sensitivities, write_sensitivities


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--noise", type=float, nargs="*", default=[], help="relative energies")
    parser.add_argument("--weights", nargs="+", default=["*"], help="globs on (ends of) names, for --noise")
    parser.add_argument("--out", help="file for the sensitivities")
    args = parser.parse_args()

    source = open_source(args.model)
    calibration = Calibration(args.text, args.tokens, args.seq_len, args.seed)
    tokens = sequences(calibration, load_tokenizer(source))
    skeleton = Skeleton(source)
    weights = {n: w for n, w in quantizable(skeleton.model).items() if n not in skeleton.tied}
    settings = {"seed": args.seed, "dtype": DTYPES[args.dtype]}
    start, cpu = time.monotonic(), time.process_time()
    fisher = fisher_sensitivities(skeleton, weights, tokens, **settings)
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    if args.out:
        about = {"model": source.fingerprint(), "calibration": calibration.fingerprint()}
        write_sensitivities(args.out, Sensitivities(fisher, *about.values(), *tokens.shape, args.seed, args.dtype))
    inside = {n: s for n, s in fisher.items() if skeleton.block_of(n) is not None}
    largest = sorted(inside, key=lambda n: -inside[n].alpha)[:10]
    line = {
        "model": args.model,
        "sequences": len(tokens),
        "seq_len": args.seq_len,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "alpha_blocks": round(sum(s.alpha for s in inside.values()), 3),
        "outside": {
            n: [round(v, 4) for v in (s.alpha, s.alpha_se, s.embedding_alpha, s.embedding_alpha_se)]
            for n, s in fisher.items()
            if n not in inside
        },
        "largest": {n: [round(inside[n].alpha, 3), round(inside[n].alpha_se, 3)] for n in largest},
    }
    print(json.dumps(line), flush=True)
    chosen = {n: w for n, w in weights.items() if any(Rule(glob, None).matches(n) for glob in args.weights)}
    for energy in args.noise:
        start = time.monotonic()
        noise = noise_sensitivities(skeleton, chosen, tokens, energy=energy, **settings)
        seconds = time.monotonic() - start
        for name, s in noise.items():
            line = {
                "weight": name,
                "energy": energy,
                "noise": [round(v, 4) for v in (s.alpha, s.alpha_se, s.embedding_alpha, s.embedding_alpha_se)],
                "noise_by_fisher": round(s.alpha / fisher[name].alpha, 4),
                "seconds_all": round(seconds, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
