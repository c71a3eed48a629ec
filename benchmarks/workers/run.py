"""One subject of the comparison in a process of its own: answers requests, a line of JSON each.

`python run.py SUBJECT`, SUBJECT being a module beside this file, in whichever environment has what
that module imports. What it prints besides goes to stderr.
"""

import importlib
import json
import os
import queue
import sys
import threading
import time

import numpy as np


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = None
    while True:
        request = REQUESTS.get()
        answer: dict = {}
        try:
            subject = importlib.import_module(sys.argv[1])
            match request["do"]:
                case "prepare":
                    with np.load(request["arrays"]) as arrays:
                        job = subject.prepare(request["case"], dict(arrays))
                    answer = job.facts
                case "run":
                    job.run()  # finds caches and memory again after the others' turns
                    start = time.perf_counter()
                    job.run()
                    answer = {"seconds": time.perf_counter() - start}
                case "outcome":
                    np.savez(request["to"], **job.outcome())
                case "forget":
                    job = None
                case name:
                    answer = getattr(subject, name)()
        except Exception as error:  # to be told by the one who asked
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


REQUESTS: queue.SimpleQueue = queue.SimpleQueue()


def listen() -> None:
    """Ends the process when the one who asks has gone, whatever is being computed."""
    for line in sys.stdin:
        REQUESTS.put(json.loads(line))
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=listen, daemon=True).start()
    main()
