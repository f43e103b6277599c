"""The main job beside busy programs, by how its threads wait for each other: python tests/bench/busy.py"""

import argparse
import subprocess
import sys

from llm_shared import WAITING
from harness import Contender, race, record

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", nargs="+", type=int, default=[0, 1, 3], help="how many busy programs")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    jobs = {  # title: (factory, arguments before and after the type, is memory kept)
        "training step, mini, 8×256": ("models:train_ours", ("mini",), (), True),
        "generation, mini, 1 rows": ("models:generate_ours", ("mini",), (1,), False),
    }
    for title, (factory, before, after, keep) in jobs.items():
        for dtype in options.dtypes:
            args = (*before, dtype, *after)
            found = {
                "ours": Contender(factory, args, keep, WAITING),
                "OpenMP's default, spinning": Contender(factory, args, keep),
                "ours, sleeping at once": Contender(factory, args, keep, {"OMP_WAIT_POLICY": "passive"}),
            }
            for n in options.programs:
                busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
                times = race(found, options.rounds)
                for program in busy:
                    program.kill()
                record("busy", f"{title}, {dtype}, beside {n} busy programs", times)
