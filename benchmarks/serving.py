"""`gold_jax.serve` under load: from start to ready, one client, then many at once, lost and different answers, memory.

    python benchmarks/serving.py MODEL [--clients 16] [--seconds 60]

Every client asks one of 50 questions again and again, greedily; an answer that differs from what the question got alone counts.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

QUESTIONS = [f"How do you say {number}?" for number in random.Random(0).sample(range(1, 9999), 50)]


def resident(process: subprocess.Popen) -> int:
    """MiB of memory that a process holds."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) >> 10


def ask(client: httpx.Client, question: str, tokens: int) -> tuple[str, int]:
    """The answer to a question, and how many tokens it has."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    args = parser.parse_args()
    command = [sys.executable, "-m", "gold_jax.serve", "--model_name_or_path", args.model, "--port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.:]+", line)))
        print(
            f"ready after {time.perf_counter() - began:.1f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
        try:
            measure(lambda: httpx.Client(base_url=url, timeout=600), server, args)
        finally:
            server.terminate()


def measure(connect, server: subprocess.Popen, args: argparse.Namespace) -> None:
    """Prints what one client gets, then many; `connect` makes a client."""
    alone, tokens, began = {}, 0, time.perf_counter()
    with connect() as client:
        for number, question in enumerate(QUESTIONS):
            alone[question], more = ask(client, question, args.tokens)
            tokens += more
            if not number:
                print(f"the first answer after {time.perf_counter() - began:.1f} s")
    print(f"one client: {tokens / (time.perf_counter() - began):.0f} tokens/s, {resident(server)} MiB resident")
    counts, began = collections.Counter(), time.perf_counter()
    end = began + args.seconds

    def work(seed: int) -> None:
        draw = random.Random(seed)
        with connect() as client:
            while time.perf_counter() < end:
                question = draw.choice(QUESTIONS)
                try:
                    text, tokens = ask(client, question, args.tokens)
                except httpx.HTTPError as error:
                    print(f"lost: {error!r}")
                    counts["lost"] += 1
                else:
                    counts.update(answers=1, tokens=tokens, different=text != alone[question])

    with ThreadPoolExecutor(args.clients) as pool:
        working = [pool.submit(work, seed) for seed in range(args.clients)]
        time.sleep(args.seconds / 2)
        half = resident(server)
        for one in working:
            one.result()
    seconds = time.perf_counter() - began
    print(
        f"{args.clients} clients, {seconds:.0f} s: {counts['answers']} answers, {counts['tokens'] / seconds:.0f} tokens/s, "
        f"{counts['lost']} lost, {counts['different']} other than alone; {half} MiB resident after half, {resident(server)} at "
        f"the end; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
