"""llama.cpp as a contestant, for a python that has llama-cpp-python; told line by line what to do.

    PYTHON benchmarks/llama_peer.py model.gguf 2          a file, and how many threads

Each line of the input is JSON: {"prompt": ids, "n": how many tokens to write, "greedy": true or
false}. Each line of the output: {"seconds": for all of it, "tokens": how many came}. Drawn with
temperature 0.8 and top-p 0.9. Nothing of ours is imported: that python need not have torch.
"""

import json
import sys
import time
from itertools import islice

from llama_cpp import Llama


def main(file: str, threads: int) -> None:
    """Answer until the input ends."""
    model = Llama(
        file, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        drawn = {"temp": 0.0} if asked["greedy"] else {"temp": 0.8, "top_p": 0.9}
        model.reset()  # or it would begin where an equal prompt ended
        started = time.perf_counter()
        tokens = model.generate(asked["prompt"], top_k=0, min_p=0.0, repeat_penalty=1.0, **drawn)
        n = sum(1 for _ in islice(tokens, asked["n"]))
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": n}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
