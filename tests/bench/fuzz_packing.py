"""Folders of damaged pictures and odd files, packed one after another until something is wrong.

    python tests/bench/fuzz_packing.py [SECONDS] [SEED]

Each round makes a folder of 500 files by its seed (``tests/messy_folder.py``), packs it on two
processes and looks at the outcome: the program ends by itself within two minutes without a word on
standard error, no process takes more than 400 MiB, every file is stored, refused or ignored, and
what is stored decodes in DALI to Pillow's picture within 2 levels. Prints a JSON line for each
round; the folder of one that went wrong stays and is named.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np

from tests.messy_folder import fill, made_files, pack_and_check, real_files

FILES, LIMIT_S, PEAK_MIB = 500, 120, 400
DATA = Path(os.environ.get("MOCO_TEST_DATA", ROOT.parent / "shared" / "data"))


def tell(line: dict[str, object]) -> None:
    """One JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Pack one folder after another."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    warnings.simplefilter("ignore")
    real = real_files(DATA)
    tell({"real_files": len(real), "seconds": seconds})
    end, wrong = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        rng = np.random.default_rng(seed)
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        fill(folder / "in", made_files(rng) + real, FILES, rng)
        started = time.monotonic()
        try:
            outcome, peak_mib, far = pack_and_check(folder, limit_s=LIMIT_S)
            bad = far or peak_mib > PEAK_MIB or outcome["crashed"] or outcome["took too long"]
            line = {**outcome, "peak_mib": round(peak_mib), "apart": far}
        except (AssertionError, TimeoutError, RuntimeError) as error:
            bad, line = True, {"error": str(error)[-2000:]}
        line |= {"seed": seed, "seconds": round(time.monotonic() - started, 1)}
        tell(line | ({"folder": str(folder)} if bad else {}))
        wrong += bool(bad)
        if not bad:
            shutil.rmtree(folder)
        seed += 1
    tell({"rounds_gone_wrong": wrong})
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
