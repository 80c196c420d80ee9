"""Start a command, and start it again when it dies: a supervisor for long runs.

    python -m babyllama.analysis.supervise --retries 3 -- torchrun --nproc_per_node 2 pretrain.py
    python -m babyllama.analysis.supervise -- python pretrain.py

A training run goes on from its newest checkpoint when it is started again, so starting it again is
all that is needed after a crash, a killed process or a lost node. Not started again: what ended by
itself with 0 (done), 2 (bad input), 75 (stopped on request) or 130 (Ctrl-C), what broke sooner than
--min-uptime, for it would break again, and what was ended through this program. torchrun ends with
1 whatever its processes said; the bad input of those falls under --min-uptime.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from babyllama.config import BAD_INPUT, INTERRUPTED, STOPPED, aloud, parse, run, stop_requests
from babyllama.errors import ConfigError

FINAL = (0, BAD_INPUT, STOPPED, INTERRUPTED)


@dataclass(frozen=True)
class LaunchConfig:
    """Restarts: how often, and how soon.

    Args:
        retries: start the command again at most this often
        min_uptime: seconds; what breaks sooner is not started again
    """

    retries: int = 3
    min_uptime: float = 60.0

    def __post_init__(self) -> None:
        if self.retries < 0 or not self.min_uptime >= 0:
            raise ConfigError(
                f"retries and min_uptime want 0 or more, found {self.retries}, {self.min_uptime}"
            )


def supervise(command: Sequence[str], cfg: LaunchConfig) -> int:
    """Run the command until it ends for good; returns its last exit code, 128 + n after signal n.

    raises: ConfigError if there is no such command
    """
    for left in range(cfg.retries, -1, -1):
        started = time.monotonic()
        code, was_asked = _run_once(command)
        seconds = time.monotonic() - started
        if code in FINAL or was_asked:
            return code
        _say(f"ended with {code} after {seconds:.0f} s")
        if seconds < cfg.min_uptime:
            _say(f"sooner than {cfg.min_uptime:.0f} s: it would break again (--min-uptime)")
            return code
        if left:
            _say(f"again, {left} of {cfg.retries} times left")
    _say(f"broke {cfg.retries + 1} times (--retries)")
    return code


def _say(text: str) -> None:
    aloud(lambda: print(f"launch: {text}", file=sys.stderr, flush=True))


def _run_once(command: Sequence[str]) -> tuple[int, bool]:
    """The exit code of one run of the command, and whether a signal to this program ended it."""
    try:
        # Of its own session, so that Ctrl-C in a terminal reaches it once, from here.
        process = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        raise ConfigError(
            f"cannot start {command[0]!r}: {error.strerror}; check the path"
        ) from None

    def hand_on(number: int) -> None:
        if os.name == "posix" or number != signal.SIGINT:  # a Windows console tells both
            process.send_signal(number)

    with stop_requests(hand_on) as asked:
        code = process.wait()
    return (code if code >= 0 else 128 - code), bool(asked)


def main(argv: Sequence[str]) -> int:
    """Split the words at the first "--" and run what follows."""
    place = argv.index("--") if "--" in argv else len(argv)
    cfg = parse(LaunchConfig, __doc__, argv=argv[:place])
    if not argv[place + 1 :]:
        raise ConfigError(
            "nothing to start: put the command behind --, as in "
            "python -m babyllama.analysis.supervise -- python pretrain.py"
        )
    return supervise(argv[place + 1 :], cfg)


if __name__ == "__main__":
    run(main, sys.argv[1:])
