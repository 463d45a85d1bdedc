"""`python -m tests.soak`: siglit under disturbances for up to an hour, with a table at the end; `make soak`.

Two cores suffice. A failure names its seed, and `--seed N --chain K` repeats that chain of kills.
"""

import argparse
import tempfile
import time
from pathlib import Path

from tests.soak.kills import run_kills


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", type=int)
    parser.add_argument("--flips", type=int, default=2)
    parser.add_argument("--part")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="siglit-soak-"))
    print(f"seed {given.seed}, in {place}", flush=True)
    from tests.soak.damage import run_damages
    from tests.soak.project import make_damage_place, make_place

    (place / "project").mkdir()
    project = make_place(place / "project")
    if given.part == "damage":
        d = make_damage_place(project, place / "damaged")
        for name, t in run_damages(d, given.flips, given.seed, time.monotonic() + 60 * given.minutes).items():
            print(name, dict(t.outcomes), round(t.seconds))
            for f in t.failures:
                print("   ", f)
        return
    place = project
    tallies = run_kills(place, given.kills, given.seed, time.monotonic() + 60 * given.minutes, given.chain)
    for title, t in tallies.items():
        print(title, t)


if __name__ == "__main__":
    main()
