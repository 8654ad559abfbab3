"""Errors, speed and memory on one GPU, for models of 7B to 65B with random weights.

    python benchmarks/gpu.py                       # under nine minutes on an H100, no downloads
    python benchmarks/gpu.py --plan                # the plan and its seconds; runs nothing
    python benchmarks/gpu.py --parts 7B peers      # only these parts
    python benchmarks/gpu.py --device cpu --small  # tiny shapes: tries every path, measures nothing

Each part is a list of cases and runs in its own process. A case that fails, does not fit, exceeds
its limit or needs something absent is recorded as "not measured" with the reason. The rest goes on,
in a new process if necessary. Results are written after every case. The same command again runs the
cases that have neither a result nor a reason, and those that ran out of time. The share of the
bound is explained in bound.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.gpu_parts import NotMeasured  # noqa: E402
from benchmarks.gpu_parts.plan import Case, Part, all_parts, total_seconds  # noqa: E402
from benchmarks.gpu_parts.report import in_short, plan_table, table  # noqa: E402
from benchmarks.gpu_parts.results import Results  # noqa: E402
from benchmarks.gpu_parts.worker import Workers, work  # noqa: E402

LEAST_SECONDS = 2.0
"""No case begins with less time left."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in all_parts(is_small=True)]
    parser.add_argument(
        "--parts", nargs="+", choices=names, metavar="PART", help=f"all, if not given: {names}"
    )
    parser.add_argument(
        "--again", nargs="+", choices=names, metavar="PART", default=[], help="measured once more"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="when those are over, what runs is ended"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON file of results; gone on with if it is there"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the parts and their seconds, and run nothing"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    if options.worker:
        work()
        return
    parts = [
        part for part in all_parts(options.small) if not options.parts or part.name in options.parts
    ]
    if options.plan:
        print(plan_table(parts))
        return
    ends = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no worker stays behind
    results = Results(options.out or default_file(options.small))
    with Workers([sys.executable, __file__, "--worker", "--device", options.device]) as workers:
        machine = described(workers)
        if options.device == "cuda" and not machine["num_gpus"]:
            sys.exit(
                "there is no CUDA device here. "
                "`--device cpu --small` tries every path on tiny shapes."
            )
        results.begin(machine, options.small)
        run_all(results, results.left_of(parts, options.again), workers, ends)
    print(table(results.content))
    print(f"written to {results.file}")


def default_file(is_small: bool) -> Path:
    """File of the results if `--out` names none."""
    return ROOT / "benchmarks" / "results" / ("gpu_small.json" if is_small else "gpu.json")


def described(workers: Workers) -> dict[str, object]:
    """The machine as the first worker describes it.

    Raises:
        SystemExit: no worker starts.
    """
    try:
        return workers.machine()
    except NotMeasured as error:
        sys.exit(f"the benchmark cannot start: {error}")


def run_all(
    results: Results, left: list[tuple[Part, list[Case]]], workers: Workers, ends: float
) -> None:
    """Run cases until the time is up, and keep the result of each.

    A part may use its own planned seconds and all that earlier parts saved, but never the seconds
    planned for later parts.

    Args:
        ends: `time.monotonic()` at which everything must be over.
    """
    for number, (part, cases) in enumerate(left):
        behind = total_seconds([later for later, _ in left[number + 1 :]])
        part_ends = max(ends - behind, min(ends, time.monotonic() + part.seconds))
        worker = None
        for case in cases:
            seconds = min(float(case.limit_seconds), part_ends - time.monotonic())
            if seconds < LEAST_SECONDS:
                if not results.is_done(part.name, case.name):
                    row = {
                        "not measured": "the time was used up",
                        "unfinished": True,
                        "seconds": 0.0,
                    }
                    results.add(part.name, case.name, row)
                continue
            if worker is None or worker.is_over or case.own_process:
                worker = workers.fresh()
                worker.wait_until_ready()
                seconds = max(LEAST_SECONDS, min(seconds, part_ends - time.monotonic()))
            row = worker.run(case, seconds)
            results.add(part.name, case.name, row)
            print(
                f"{part.name} | {case.name} | {row['seconds']:.1f} s | {in_short(row)}", flush=True
            )


if __name__ == "__main__":
    main()
