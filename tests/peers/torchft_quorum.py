"""Peer: seconds until torchft's lighthouse has given a quorum to very many replicas that ask for it at once, each over a connection of its own.

usage: torchft_quorum.py [REPLICAS]        by default 1024"""
import concurrent.futures, os, sys, time
from datetime import timedelta

from torchft.coordination import LighthouseClient, LighthouseServer

replicas = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs every member of every quorum
lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=replicas, join_timeout_ms=60_000, quorum_tick_ms=100)
# torchft gives the host's name, which a machine may not resolve.
address = f"http://127.0.0.1:{lighthouse.address().rsplit(':', 1)[1]}"


def ask(replica):
    client = LighthouseClient(address, connect_timeout=timedelta(seconds=60))
    quorum = client.quorum(replica_id=f"r{replica}", timeout=timedelta(seconds=60))
    return time.time(), quorum


began = time.time()
with concurrent.futures.ThreadPoolExecutor(replicas) as pool:
    answers = list(pool.map(ask, range(replicas)))
assert all(len(quorum.participants) == replicas for _, quorum in answers), "a quorum of all"
print(f"| torchft's lighthouse: a quorum of {replicas} over as many connections | {max(at for at, _ in answers) - began:.2f} s | |", flush=True)
lighthouse.shutdown()
