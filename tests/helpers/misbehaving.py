"""A command that ends as its argument says; the tests of bench.faults run it as `python -m` would."""

import os
import signal
import sys
import time


def main(how: str) -> int:
    """Misbehaves; returns the exit code."""
    match how:
        case "writes":
            with open("out/a.txt", "w") as file:
                file.write("result")
        case "writes-other":
            with open("out/a.txt", "w") as file:
                file.write("another result")
        case "leaves":
            main("writes")
            with open("out/a.txt.tmp", "w") as file:
                file.write("res")
        case "refuses":
            print("error: --seed x: not a number; give a whole number.", file=sys.stderr)
            return 2
        case "refuses-in-two-lines":
            print("error: --seed x: not a number;\ngive a whole number.", file=sys.stderr)
            return 2
        case "refuses-without-cure":
            print("error: --seed x is odd.", file=sys.stderr)
            return 2
        case "says-nothing":
            return 1
        case "raises":
            raise KeyError("lost")
        case "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hangs":
            time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
