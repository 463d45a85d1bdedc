"""`python -m tests.soak`: siglit under disturbances for up to an hour, and a table at the end; `make soak`.

A failure is printed when it happens, with what repeats it: `--seed N`, and for a chain of kills `--chain K`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.damage import run_damages
from tests.soak.disk import run_disk
from tests.soak.kills import run_kills
from tests.soak.project import make_damage_place, make_place

PARTS = ("kills", "damage", "disk")


def main(words=None):
    """Run the parts; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="run this part alone; may be given twice")
    parser.add_argument("--minutes", type=float, default=55, help="begin nothing after these; default: 55")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs; default: 200")
    parser.add_argument("--flips", type=int, default=4, help="flipped bits for each kind of file; default: 4")
    parser.add_argument("--rounds", type=int, default=4, help="full disks and so on for each command; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random; default: 0")
    parser.add_argument("--chain", type=int, help="run this chain of kills alone")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="OUT.json and OUT.md are written")
    given = parser.parse_args(words)
    place = Path(tempfile.mkdtemp(prefix="siglit-soak-"))
    until = time.monotonic() + 60 * given.minutes
    print(f"seed {given.seed}, in {place}", flush=True)
    (place / "project").mkdir()
    project = make_place(place / "project")
    rows = []
    for part in given.part or PARTS:
        begun = time.monotonic()
        if part == "damage":
            tallies = run_damages(
                make_damage_place(project, place / "damage" / "place"), given.flips, given.seed, until
            )
            rows += [damage_row(name, tally) for name, tally in tallies.items()]
        elif part == "disk":
            rows += [
                disk_row(name, tally) for name, tally in run_disk(project, given.rounds, given.seed, until).items()
            ]
        else:
            tallies = run_kills(project, given.kills, given.seed, until, given.chain)
            rows += [kill_row(title, tally) for title, tally in tallies.items()]
        print(f"{part}: {(time.monotonic() - begun) / 60:.1f} min", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps({"seed": given.seed, "rows": rows}, indent=2) + "\n")
    given.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    failures = [failure for row in rows for failure in row["failures"]]
    if not failures:
        shutil.rmtree(place)
    return 1 if failures else 0


def kill_row(title, tally):
    kills = ", ".join(f"{name} {count}" for name, count in tally.kills.items())
    return row(
        f"SIGKILL: {title}",
        f"{sum(tally.kills.values())} kills ({kills}), {tally.chains} chains",
        tally,
        "equal" if tally.chains else "not run",
    )


def disk_row(name, tally):
    return row(
        name, f"{tally.done} runs, {tally.met} ended by it", tally, "named, then equal" if tally.done else "not run"
    )


def damage_row(name, tally):
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in tally.outcomes.most_common())
    unchecked = f"; {tally.unchecked}" if tally.unchecked else ""
    return row(f"damaged: {name}", f"{sum(tally.outcomes.values())} damages", tally, f"{outcomes}{unchecked}")


def row(disturbance, times, tally, result):
    """One row of the table."""
    failed = f"{len(tally.failures)} FAILED; " if tally.failures else ""
    return {
        "disturbance": disturbance,
        "times": times,
        "result": failed + result,
        "seconds": round(tally.seconds),
        "failures": tally.failures,
    }


def table(rows):
    """The rows in Markdown."""
    lines = [f"| {row['disturbance']} | {row['times']} | {row['result']} |" for row in rows]
    return "\n".join(["| disturbance | times | result |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
