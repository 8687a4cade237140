"""Line coverage of the device code, from the counters of the emulator's plain build (make coverage)."""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lines() -> dict[str, dict[int, int]]:
    """file -> line -> times run, over all instantiations."""
    counters = [path.resolve() for path in (ROOT / "build" / "emulator").rglob("_emulator_kernels_plain.dir/**/*.gcda")]
    if not counters:
        raise SystemExit("no counters in build/emulator; run make coverage")
    found: dict[str, dict[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["gcov", "--json-format", *map(str, counters)], cwd=folder, check=True, capture_output=True)
        for path in Path(folder).glob("*.gcov.json.gz"):
            for file in json.loads(gzip.decompress(path.read_bytes()))["files"]:
                name = Path(file["file"])
                name = (name if name.is_absolute() else ROOT / name).resolve()
                device = name.suffix in (".cu", ".cuh") and name.is_relative_to(ROOT / "csrc")
                if not device:
                    continue
                record = found.setdefault(str(name.relative_to(ROOT)), {})
                for line in file["lines"]:
                    number = line["line_number"]
                    record[number] = record.get(number, 0) + line["count"]
    return found


def main() -> None:
    total = run = 0
    for name, record in sorted(lines().items()):
        missed = sorted(number for number, count in record.items() if count == 0)
        total, run = total + len(record), run + len(record) - len(missed)
        print(f"{name}: {100 * (1 - len(missed) / len(record)):.1f} % of {len(record)} lines; missed {missed}")
    print(f"device code: {100 * run / total:.1f} % of {total} lines")


if __name__ == "__main__":
    main()
