"""Times how Peapod, torchrun and torchft get over the same faults, in alternation: as many ranks, as many bytes of gradient.

Peapod trains its demo model with an adapter of that many bytes: real steps on real shards, with models that a replacement has to load. The
peers' scripts do nothing but an all-reduce in a loop. Times are those of the survivors' applied steps, as the workers log them.

A recovery is said beyond the step itself: from the fault to the survivors' next applied step, less what such a step takes them afterwards.

usage: bench_recovery.py COORDINATOR WORKER [--ranks N] [--bytes N] [--rounds N] [--only NAME ...] [--torchft-python PYTHON] [--no-peers]
exit: 1 if a median is above what the project promises"""
import argparse, collections, datetime, json, os, pathlib, re, shutil, signal, socket, statistics, subprocess, sys, tempfile, time

here = pathlib.Path(__file__).parent
SCENARIOS = ["kill", "stop", "cut", "coordinator", "both", "checkpoint"]
parser = argparse.ArgumentParser()
parser.add_argument("coordinator", type=pathlib.Path)
parser.add_argument("worker", type=pathlib.Path)
parser.add_argument("--ranks", type=int, default=2)
parser.add_argument("--bytes", type=int, default=24_000_000, help="of gradient, about")
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
parser.add_argument("--torchft-python", default=sys.executable, help="an interpreter that has torchft, if this one has not")
parser.add_argument("--no-peers", action="store_true")
options = parser.parse_args()
HEARTBEAT_TIMEOUT = 3.0
# What the project promises, in seconds.
MOST = {"kill": 0.5, "stop": HEARTBEAT_TIMEOUT + 0.5, "cut": HEARTBEAT_TIMEOUT + 0.5, "coordinator": 0.5, "both": 1.0, "checkpoint": 0.010}
LEAST_GOODPUT = 0.98

JOB = """
name = "recovery"
[model]
path = "{demo}/model"
[student]
path = "{demo}/model/text_encoder_zh"
context_length = 24
[adapter]
hidden = {hidden}
[data]
shards = ["{demo}/shards/{{00000..00005}}.tar"]
buckets = [[64, 64], [96, 64], [64, 96]]
[train]
steps = 1000000
global_batch = {ranks}
micro_batch = 1
learning_rate = 1e-4
warmup_steps = 0
[checkpoint]
every_steps = {every_steps}
"""
Applied = collections.namedtuple("Applied", "at step generation members")


def hidden_width():
    """The width of the demo's adapter at which it has so many bytes: two linears into and out of a square one, a layer norm, the pooled head."""
    model = here.parent / "demo/model"
    width = lambda part, key: json.loads((model / part / "config.json").read_text())[key]
    student, pooled, texts = width("text_encoder_zh", "hidden_size"), width("text_encoder_2", "projection_dim"), width("unet", "cross_attention_dim")
    num = lambda hidden: 2 * student + student * hidden + hidden * hidden + hidden * pooled + pooled * texts + texts
    return next(hidden for hidden in range(8, 65536, 8) if 4 * num(hidden) >= options.bytes)


class Network:
    """A network namespace for each rank, with a cable to the coordinator's bridge that can be pulled."""

    def __init__(self):
        self.name = f"pea{os.getpid() % 100000}"
        self.address = "10.213.77.1"
        self.ip("link", "add", self.name, "type", "bridge")
        self.ip("addr", "add", f"{self.address}/24", "dev", self.name)
        self.ip("link", "set", self.name, "up")
        for rank in range(options.ranks):
            space, cable = f"{self.name}-{rank}", f"{self.name}v{rank}"
            self.ip("netns", "add", space)
            self.ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            self.ip("link", "set", cable, "master", self.name, "up")
            self.ip("-n", space, "addr", "add", f"10.213.77.{10 + rank}/24", "dev", "eth0")
            self.ip("-n", space, "link", "set", "eth0", "up")
            self.ip("-n", space, "link", "set", "lo", "up")
        # Where a container engine lets nothing be forwarded, the ranks would not reach each other either.
        self.rule = ["FORWARD", "-i", self.name, "-o", self.name, "-j", "ACCEPT"] if shutil.which("iptables") else None
        if self.rule:
            subprocess.run(["iptables", "-I", *self.rule], check=True, stderr=subprocess.DEVNULL)

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, stderr=subprocess.PIPE)

    def cable(self, rank, state):
        self.ip("link", "set", f"{self.name}v{rank}", state)

    def remove(self):
        if self.rule:
            subprocess.run(["iptables", "-D", *self.rule], check=True, stderr=subprocess.DEVNULL)
        for rank in range(options.ranks):
            self.ip("netns", "del", f"{self.name}-{rank}")
        self.ip("link", "del", self.name)


class Cluster:
    """A coordinator and its workers, each with a log that is read for when what happened."""

    def __init__(self, every_steps=1_000_000, network=None):
        self.folder = tempfile.TemporaryDirectory(prefix="peapod-recovery-")
        self.path = pathlib.Path(self.folder.name)
        job = JOB.format(demo=here.parent / "demo", hidden=hidden_width(), ranks=options.ranks, every_steps=every_steps)
        (self.path / "job.toml").write_text(job)
        self.network = network
        host = network.address if network else "127.0.0.1"
        with socket.socket() as listener:
            listener.bind((host, 0))
            self.address = f"{host}:{listener.getsockname()[1]}"
        self.running, self.started = [], 0

    def __enter__(self):
        try:
            self.start_coordinator()
            self.workers = [self.start_worker(rank) for rank in range(options.ranks)]
            self.next_step(self.workers[0], 0, options.ranks)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.running:
            process.kill()
            process.wait()
        self.folder.cleanup()
        if self.network:
            self.network.remove()

    def start(self, name, command, **environment):
        self.started += 1
        log = self.path / f"{name}-{self.started}.log"
        with log.open("w") as file:
            process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, env={**os.environ, **environment})
        process.log = log
        self.running.append(process)
        return process

    def start_coordinator(self):
        asked = ["--world-size", options.ranks, "--min-world-size", 1, "--job", self.path / "job.toml", "--listen", self.address]
        asked += ["--state-dir", self.path / "state", "--heartbeat-timeout", f"{HEARTBEAT_TIMEOUT:g}s"] + ["--insecure"] * bool(self.network)
        self.coordinator = self.start("coordinator", [options.coordinator, *asked])

    def start_worker(self, rank):
        threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
        asked = ["--coordinator", f"http://{self.address}", "--rank", rank, "--threads", threads]
        inside = ["ip", "netns", "exec", f"{self.network.name}-{rank}"] if self.network else []
        return self.start("worker", [*inside, options.worker, *asked], RUST_LOG="info,peapod_worker::trainer=debug", OMP_NUM_THREADS=str(threads))

    def steps(self, worker):
        pattern = re.compile(r"(\S+Z) .*applied step (\d+) in g(\d+), of (\d+) members")
        found = (pattern.match(line) for line in plain(worker))
        return [Applied(moment(line[1]), int(line[2]), int(line[3]), int(line[4])) for line in found if line]

    def next_step(self, worker, since, members, patience=90):
        """The worker's first step after a moment in a generation of so many."""
        until = time.time() + patience
        while time.time() < until:
            for step in self.steps(worker):
                if step.at > since and step.members == members:
                    return step
            dead = [process for process in (worker, self.coordinator) if process.poll() is not None]
            if dead and dead[0] is worker:
                break
            time.sleep(0.02)
        raise SystemExit(f"no step of {members} members:\n{self.tails()}")

    def usual_step(self, worker, since, number=8):
        """Seconds between the worker's steps after a moment."""
        until = time.time() + 60
        while len(steps := [step.at for step in self.steps(worker) if step.at >= since]) <= number and time.time() < until:
            time.sleep(0.05)
        return statistics.median(after - before for before, after in zip(steps, steps[1:]))

    def when(self, process, words, patience=60):
        """When a process first said something."""
        until = time.time() + patience
        while time.time() < until:
            for line in plain(process):
                if words in line:
                    return moment(line.split(" ", 1)[0])
            time.sleep(0.01)
        raise SystemExit(f"nobody said {words!r}:\n{self.tails()}")

    def tails(self):
        return "\n".join(f"{process.log.name}: " + "\n  ".join(plain(process)[-8:]) for process in self.running)


def plain(process):
    """The whole lines of a log, without colours."""
    text = process.log.read_text(errors="replace")
    return re.sub(r"\x1b\[[0-9;]*m", "", text[: text.rfind("\n") + 1]).splitlines()


def moment(text):
    """Seconds since 1970 of a log's time."""
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def lose_one(fault):
    """A worker is killed, stopped or cut off, the others go on without it, and another one takes its place."""
    with Cluster(network=Network() if fault == "cut" else None) as cluster:
        survivor, victim = cluster.workers[0], cluster.workers[-1]
        time.sleep(3)
        usual = cluster.usual_step(survivor, time.time() - 3)
        at = time.time()
        if fault == "cut":
            cluster.network.cable(options.ranks - 1, "down")
        else:
            victim.send_signal({"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        after = cluster.next_step(survivor, at, options.ranks - 1)
        lost = after.at - at
        alone = cluster.usual_step(survivor, after.at)
        victim.kill()
        if fault == "cut":
            cluster.network.cable(options.ranks - 1, "up")
        began = time.time()
        replacement = cluster.start_worker(options.ranks - 1)
        whole = cluster.next_step(survivor, began, options.ranks)
        ready = cluster.when(cluster.coordinator, f"rank {options.ranks - 1} (pid {replacement.pid} on {socket.gethostname()}) is ready")
        last_alone = max(step.at for step in cluster.steps(survivor) if step.at < whole.at)
        again = cluster.usual_step(survivor, whole.at)
        return {
            "lost": lost, "usual": usual, "alone": alone, "beyond": lost - alone, "to_ready": ready - began, "admitted": whole.at - ready,
            "pause": whole.at - last_alone - again,
        }


def lose_coordinator(and_worker):
    """The coordinator is killed and started again two seconds later; a worker is killed while it is away, or not."""
    with Cluster() as cluster:
        survivor, victim = cluster.workers[0], cluster.workers[-1]
        time.sleep(3)
        usual = cluster.usual_step(survivor, time.time() - 3)
        at = time.time()
        cluster.coordinator.kill()
        cluster.coordinator.wait()
        time.sleep(1)
        if and_worker:
            victim.kill()
        time.sleep(1)
        cluster.start_coordinator()
        back = cluster.when(cluster.coordinator, "listening on")
        if and_worker:
            after = cluster.next_step(survivor, back, options.ranks - 1)
            return {"beyond": after.at - back - cluster.usual_step(survivor, after.at)}
        cluster.when(cluster.coordinator, "have trained on meanwhile")
        time.sleep(3)
        steps = [step for step in cluster.steps(survivor) if step.at > at - 3]
        assert len({step.generation for step in steps}) == 1, "the generation went on"
        gaps = lambda begin, end: [after.at - before.at for before, after in zip(steps, steps[1:]) if begin <= before.at < end]
        # Steps differ by themselves: beside the longest while it was away stands the longest while it was there.
        away, there = gaps(at, back + 1), gaps(0, at) + gaps(back + 1, time.time())
        return {"usual": usual, "beyond": max(away) - usual, "longest": max(away), "longest_there": max(there)}


def checkpoints():
    """What checkpoints cost the trainers' threads."""
    with Cluster(every_steps=5) as cluster:
        until = time.time() + 60
        held_up = lambda: [
            float(found[1]) / 1000
            for found in (re.search(r"checkpoint of step \d+ held training up for ([\d.]+) ms", line) for line in plain(cluster.workers[0]))
            if found
        ]
        while len(held_up()) < 8 and time.time() < until:
            time.sleep(0.1)
        stalls = held_up()
        return {"beyond": statistics.median(stalls), "longest": max(stalls)}


def peer(python, script, fault):
    """What a peer's script says, in seconds; infinity where nothing came."""
    command = [python, here / script, "--ranks", options.ranks, "--bytes", options.bytes, "--fault", fault]
    command += ["--trials", 1] if script.startswith("torchrun") else []
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    number = lambda words: next((float(found) for found in re.findall(rf"{words}.*: ([\d.]+) s", done.stdout)), float("inf"))
    # torchrun starts all ranks anew: nobody is admitted.
    return {"lost": number(f"{fault} of")} | ({"admitted": number("replacement")} if script.startswith("torchft") else {})


measures = {
    "kill": lambda: lose_one("kill"),
    "stop": lambda: lose_one("stop"),
    "cut": lambda: lose_one("cut"),
    "coordinator": lambda: lose_coordinator(False),
    "both": lambda: lose_coordinator(True),
    "checkpoint": checkpoints,
}
if "cut" in options.only and (os.geteuid() != 0 or not shutil.which("ip")):
    print("no network is cut: that needs root and the program ip")
    options.only = [name for name in options.only if name != "cut"]
results = collections.defaultdict(lambda: collections.defaultdict(list))
for number in range(options.rounds):
    for name in options.only:
        runs = [("peapod", measures[name])]
        if name in ("kill", "stop") and not options.no_peers:
            runs += [("torchrun", lambda: peer(sys.executable, "torchrun_recovery.py", name))]
            runs += [("torchft", lambda: peer(options.torchft_python, "torchft_recovery.py", name))]
        for who, measure in runs:
            measured = measure()
            for key, value in measured.items():
                results[name, who][key].append(value)
            print(f"round {number + 1}, {name}, {who}: " + ", ".join(f"{key} {value:.3f}" for key, value in measured.items()), flush=True)


def seconds(name, who, key):
    """A median and its span, as a table's cell."""
    values = results[name, who][key]
    if not values:
        return ""
    text = lambda value: "none in 60 s" if value == float("inf") else f"{value * 1000:.1f} ms" if name == "checkpoint" else f"{value:.2f} s"
    span = f" ({text(min(values))} to {text(max(values))})" if min(values) < max(values) else ""
    return text(statistics.median(values)) + span


def median(name, key):
    return statistics.median(results[name, "peapod"][key])


kilobytes = f"{options.bytes / 1e6:g} MB of gradient"
print(f"\n{options.ranks} ranks, {kilobytes}, heartbeat timeout {HEARTBEAT_TIMEOUT:g} s, medians of {options.rounds} rounds (least to most)\n")
print("| | Peapod | torchrun | torchft |\n|---|---|---|---|")
rows = [
    ("kill", "lost", "SIGKILL of a worker to the survivors' next step"),
    ("kill", "beyond", "**the same beyond the step itself**"),
    ("kill", "to_ready", "start of a replacement to its models loaded"),
    ("kill", "admitted", "from there (torchft: from its start) to a step of all"),
    ("kill", "pause", "of that, steps that were not made meanwhile"),
    ("stop", "lost", "SIGSTOP of a worker to the others' next step"),
    ("stop", "beyond", "**the same beyond the step itself**"),
    ("cut", "lost", "network of a worker cut to the others' next step"),
    ("cut", "beyond", "**the same beyond the step itself**"),
    ("coordinator", "longest", "coordinator killed, back after 2 s: longest step meanwhile"),
    ("coordinator", "longest_there", "longest step before and after"),
    ("both", "beyond", "**a worker killed meanwhile: next step after the coordinator is back, beyond the step itself**"),
    ("checkpoint", "beyond", "**checkpoint: training held up by one**"),
    ("checkpoint", "longest", "the longest of them"),
]
for name, key, words in rows:
    if name in options.only:
        cells = [seconds(name, "peapod", key)] + [seconds(name, who, key) for who in ("torchrun", "torchft")]
        if name == "both" or (name, key) == ("coordinator", "longest"):
            cells[1:] = ["the job is lost"] * 2
        print(f"| {words} | " + " | ".join(cells) + " |")
missed = [name for name in options.only if median(name, "beyond") > MOST[name]]
if "kill" in options.only:
    # The step in flight is lost as well, and the admission of the replacement costs its pause.
    cost = median("kill", "beyond") + median("kill", "usual") + max(0, median("kill", "pause"))
    goodput = {minutes: 1 - cost / (60 * minutes) for minutes in (10, 1)}
    print(f"\nA death costs {cost:.2f} s with the step in flight and the admission of the replacement: goodput {goodput[10]:.2%} at one in ten minutes, {goodput[1]:.2%} at one a minute.")
    if goodput[10] < LEAST_GOODPUT:
        missed.append("goodput")
print(f"above what is promised: {', '.join(missed)}" if missed else "all within what is promised")
sys.exit(bool(missed))
