"""Times Peapod's loader and its peer on the same shards, the same cores and the same transforms, in alternation.

Both read tars that are in the page cache, decode JPEGs, pick the aspect bucket, resize as Pillow does and crop at random. Peapod's loader also
filters, cleans captions, forms batches of one bucket and draws each sample's noise; the peer also turns its pixels into floats.
Every setting gets one run a round; medians over the rounds are compared, each side at its best setting.

usage: bench_loader.py LOADER_THROUGHPUT SHARD_FOLDER [--cores N] [--rounds N] [--samples N] [--at-least RATIO]
exit: 1 if Peapod's best setting is less than RATIO times as fast as the peer's best"""
import argparse, os, pathlib, re, statistics, subprocess, sys

here = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("loader", help="the example loader_throughput, built with --release")
parser.add_argument("shards", type=pathlib.Path, help="made here if it does not exist")
parser.add_argument("--cores", type=int, default=2)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--samples", type=int, default=600, help="samples a run of the peer; Peapod gets five times as many")
parser.add_argument("--at-least", type=float, default=3.0)
options = parser.parse_args()

NUM_SHARDS, SHARD_LEN = 6, 100
UNITS = {"webdataset": "processes", "peapod": "threads"}
if not (options.shards / f"{NUM_SHARDS - 1:05d}.tar").exists():
    options.shards.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, here / "make_photo_shards.py", options.shards, str(NUM_SHARDS), str(SHARD_LEN), "1"], check=True)
LARGE = options.shards.with_name(options.shards.name + "-large")
if not (LARGE / "00000.tar").exists():
    LARGE.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, here / "make_photo_shards.py", LARGE, "1", "40", "2", "4"], check=True)
for shard in [*options.shards.glob("*.tar"), *LARGE.glob("*.tar")]:
    shard.read_bytes()  # into the page cache

cores = sorted(os.sched_getaffinity(0))[: options.cores]
os.sched_setaffinity(0, cores)  # children inherit it
pattern = f"{options.shards}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"


def run(*command):
    said = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return float(re.findall(r"([\d.]+) samples/s", said)[-1])


peer = lambda processes: run(sys.executable, here / "loader_webdataset.py", pattern, options.samples, processes)
ours = lambda threads: run(options.loader, pattern, 5 * options.samples, threads)
settings = [("webdataset", peer, n) for n in range(2 * len(cores) + 1)] + [("peapod", ours, n) for n in range(1, len(cores) + 2)]
rates = {setting: [] for setting in settings}
for number in range(options.rounds):
    for setting in settings:
        name, measure, workers = setting
        rates[setting].append(measure(workers))
        print(f"round {number + 1}: {name}, {workers} {UNITS[name]}: {rates[setting][-1]:.0f} samples/s", flush=True)

best = {}
print(f"\nmedians of {options.rounds} rounds on {len(cores)} cores:")
for (name, _, workers), measured in rates.items():
    median = statistics.median(measured)
    best[name] = max(best.get(name, 0), median)
    print(f"  {name:<11}{workers} {UNITS[name]:<10}{median:6.0f} samples/s  ({min(measured):.0f} to {max(measured):.0f})")
large = subprocess.run([options.loader, LARGE / "00000.tar", "40", "1"], check=True, stdout=subprocess.PIPE, text=True).stdout
print("photographs of 12 megapixels,", "\n  ".join(large.splitlines()[:-1]))
ratio = best["peapod"] / best["webdataset"]
print(f"peapod's best is {ratio:.1f} times webdataset's best (at least {options.at_least:g} wanted)")
sys.exit(ratio < options.at_least)
