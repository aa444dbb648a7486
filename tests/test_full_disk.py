"""Packing onto a disk that is really full: a small tmpfs in a mount space of the test's own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "make_shards.py"
DISK_KIB = 4096
WORDS = ["pictures", "disk/out", "--shard-samples", "6", "--workers", "2"]
# Runs where the disk is mounted: leaves so much room, packs, makes room, packs again.
DRIVER = f"""
import subprocess, sys
from pathlib import Path
disk, whole = Path("disk"), {{p.name: p.read_bytes() for p in Path("whole").iterdir()}}
for room in map(int, sys.argv[1:]):
    (disk / "ballast").write_bytes(bytes(({DISK_KIB} - room) << 10))
    command = [sys.executable, {str(PROGRAM)!r}, *{WORDS!r}]
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode == 2 and full.stderr.count("\\n") == 1, (room, full.stderr)
    assert "disk/" in full.stderr and "the disk is full: free some" in full.stderr, full.stderr
    assert not list(disk.rglob("*.part")) and not (disk / "out/manifest.json").exists()
    done = len(list(disk.glob("out/.packing/done-*")))
    assert done == len(list(disk.glob("out/shard-*.tar"))) == len(list(disk.glob("out/*.index")))
    (disk / "ballast").unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, (room, again.stderr)
    assert (f"{{done}} of 7 shards are finished already" in again.stdout) == bool(done)
    assert {{p.name: p.read_bytes() for p in (disk / "out").iterdir()}} == whole
    subprocess.run(["rm", "-r", "disk/out"], check=True)
    print(room, done)
"""


@pytest.mark.slow
def test_on_a_full_disk_it_says_so_and_goes_on_to_the_same_bytes_when_there_is_room(tmp_path):
    in_a_space = ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={DISK_KIB}k tmpfs disk"
    (tmp_path / "disk").mkdir()
    (tmp_path / "pictures").mkdir()
    try:
        subprocess.run([*in_a_space, "sh", "-c", mount], cwd=tmp_path, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a disk of his own")
    for number in range(40):
        rows = np.random.default_rng(number).integers(0, 256, (120, 200, 3), np.uint8)
        Image.fromarray(rows).save(tmp_path / "pictures" / f"{number}.jpg", quality=95)
    command = [sys.executable, PROGRAM, "pictures", "whole", *WORDS[2:]]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").iterdir()) >> 10
    assert size < DISK_KIB - 500
    rooms = [0, 4, 12, 40, 200, 900, size - 200, size - 8]
    done = subprocess.run(
        [*in_a_space, "sh", "-c", f'{mount} && exec "$@"', "", sys.executable, "-c", DRIVER]
        + [str(room) for room in rooms],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    finished = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(finished) == len(rooms) and finished[0] == 0 < finished[-1]
