"""Times how fast a world of very many forms over real sockets, Peapod's coordinator and torchft's lighthouse in alternation, and what 4,096
workers that report each second cost the coordinator.

usage: bench_scale.py WORKERS_AT_SCALE COORDINATOR [--world N] [--workers N] [--seconds N] [--rounds N] [--torchft-python PYTHON] [--no-peers]
exit: 1 if something is above what the project promises"""
import argparse, pathlib, re, statistics, subprocess, sys

here = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("program", help="the example workers_at_scale")
parser.add_argument("coordinator")
parser.add_argument("--world", type=int, default=1024)
parser.add_argument("--workers", type=int, default=4096)
parser.add_argument("--seconds", type=int, default=30)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--torchft-python", default=sys.executable, help="an interpreter that has torchft, if this one has not")
parser.add_argument("--no-peers", action="store_true")
options = parser.parse_args()
failed = False


def run(*command):
    global failed
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    failed |= done.returncode != 0
    return done.stdout


ours = lambda: run(options.program, options.coordinator, options.world, 0)
peer = lambda: run(options.torchft_python, here / "torchft_quorum.py", options.world)
times = {}
for number in range(options.rounds):
    for who, measure in [("Peapod", ours)] + ([] if options.no_peers else [("torchft's lighthouse", peer)]):
        found = re.search(r"\| ([\d.]+) s", measure())
        times.setdefault(who, []).append(float(found[1]) if found else float("inf"))
        print(f"round {number + 1}: {who}: {times[who][-1]:.2f} s", flush=True)
print(f"\n| | median of {options.rounds} rounds | least to most |\n|---|---|---|")
for who, measured in times.items():
    print(f"| {who}: {options.world} members over as many connections | {statistics.median(measured):.2f} s | {min(measured):.2f} to {max(measured):.2f} s |")
print("\n| | | resident |\n|---|---|---|")
print(run(options.program, options.coordinator, options.workers, options.seconds), end="")
sys.exit(failed)
