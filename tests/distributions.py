"""Install the wheel into an empty environment and run README's quick start there.

    python tests/distributions.py FOLDER

The folder has the wheel and the source distribution, as `make dist` builds them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
WHEEL_BYTES = 300_000
CONTENTS = re.compile(r"peft_subspace/(.*\.py|py\.typed)|peft_subspace-[^/]*\.dist-info/.*")
ENTRY_POINTS = "[axolotl.plugins]\npeft_subspace = peft_subspace.axolotl:SubspacePlugin\n"


def main(folder: Path) -> None:
    """Check the wheel's size, contents and entry points, install it and run the quick start."""
    (wheel,) = folder.glob("*.whl")
    (sources,) = folder.glob("*.tar.gz")
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size:,} bytes; {sources.name}: {sources.stat().st_size:,} bytes")
    if size >= WHEEL_BYTES:
        sys.exit(f"the wheel has {size:,} bytes, and must have less than {WHEEL_BYTES:,}")
    with zipfile.ZipFile(wheel) as archive:
        if other := [name for name in archive.namelist() if not CONTENTS.fullmatch(name)]:
            sys.exit(f"the wheel should have the package alone, and has {', '.join(other)}")
        (points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        if archive.read(points).decode() != ENTRY_POINTS:
            sys.exit(f"{points} should say {ENTRY_POINTS!r}")
    with TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = Path(place) / "bin" / "python"
        install = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([python, *install, str(wheel)], check=True)
        script = [str(ROOT / "tests" / "quick_start.py"), str(ROOT / "README.md")]
        subprocess.run([python, *script], check=True, cwd=place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
