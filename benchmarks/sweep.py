"""How much faster a sweep is on two devices than one run after the other.

Four supervised runs of `lclseg.sweep` on phantoms, a device (of CPUs, a core) each; the seconds are
those of the whole command. `one after the other, all devices` trains each run on both. An untimed
turn of a few steps goes ahead: it prepares the data and fills the compilation cache.

  python -m benchmarks.sweep [--size 64] [--steps 200] [--json FILE]
"""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import harness
from lclseg.cores import usable_cores

SWEEP = """
CONFIG = {config!r}
PAIRS = {pairs}
BASE = {{
    "method": "supervised",
    "data.image_size": {size},
    "data.target_spacing_mm": {spacing},
    "data.test": ("phantom_044", "phantom_045"),
    "rounds.baseline_steps": {steps},
    "rounds.num_rounds": 0,
    "rounds.eval_every": {steps},
}}
ROWS = {{"1e-3": {{"optimizer.learning_rate": 1e-3}}, "3e-3": {{}}}}
"""
SEEDS = (0, 1)
NUM_RUNS = 2 * len(SEEDS)


def run(folder: Path, cores: set[int], *flags: str) -> None:
    """`lclseg.sweep` on these cores, from the beginning."""
    command = [sys.executable, "-m", "lclseg.sweep", f"--sweep={folder / 'sweep.py'}"]
    command += [f"--{name}={folder / name}" for name in ("workdir", "results", "data_dir")]
    subprocess.run(
        [*command, *flags],
        cwd=harness.ROOT,
        env={**harness.ENVIRONMENT, **os.environ, "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def main() -> None:
    parser = harness.parser(__doc__, repeats=1)
    parser.add_argument("--size", type=int, default=64, help="px")
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if usable_cores() < 2:
        sys.exit("found one core; wanted two, a device each")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def write(steps: int, seeds: tuple[int, ...]) -> None:
            pairs = tuple(("c1", seed) for seed in seeds)
            spacing = 128 / args.size
            config = str(harness.ROOT / "configs" / "phantom.py")
            sizes = {"size": args.size, "spacing": spacing, "steps": steps}
            content = SWEEP.format(config=config, pairs=pairs, **sizes)
            (folder / "sweep.py").write_text(content)

        def turn(cores: set[int], each: bool, seeds: tuple[int, ...] = SEEDS) -> float:
            for place in ("workdir", "results"):
                shutil.rmtree(folder / place, ignore_errors=True)
            names = [f"{row}/c1_seed{seed}" for seed in seeds for row in ("1e_3", "3e_3")]
            flags = [(f"--only={n}",) for n in names] if each else [()]
            seconds = harness.timed(lambda: [run(folder, cores, *f) for f in flags])
            done = len(list((folder / "results").glob("*/*.json")))
            if done != len(names):
                sys.exit(f"{done} runs ended well; wanted {len(names)}")
            return seconds

        setups = {
            "one after the other, 1 device": functools.partial(turn, {cores[0]}, False),
            "one after the other, all devices": functools.partial(turn, set(cores), True),
            "side by side, 2 devices": functools.partial(turn, set(cores), False),
        }
        write(2, SEEDS[:1])
        for setup in setups.values():
            setup(seeds=SEEDS[:1])
        write(args.steps, SEEDS)
        found = {n: [] for n in setups}
        for _ in range(args.repeats):
            for n, setup in setups.items():
                found[n].append(setup())
    seconds = {n: min(values) for n, values in found.items()}
    first = next(iter(seconds.values()))
    rows = [{"setup": n, "s": value, "speed-up": first / value} for n, value in seconds.items()]
    title = f"Sweep of {NUM_RUNS} runs of {args.steps} steps at {args.size} px"
    harness.report(title, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
