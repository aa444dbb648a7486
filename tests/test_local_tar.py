from pathlib import Path

import pytest

from pipeline.local_tar import file_system, is_network

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /data rw - nfs4 server:/data rw
31 30 0:27 / /data/local\\040disk rw shared:9 master:2 - xfs /dev/nvme0n1 rw
32 22 0:28 / /bucket rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "network"),
    [
        ("/home/x", "ext4", False),
        ("/data/sets", "nfs4", True),
        ("/data/local disk/sets", "xfs", False),
        ("/database", "ext4", False),
        ("/bucket", "fuse.s3fs", True),
    ],
)
def test_the_nearest_mount_point_says_what_file_system_a_folder_is_on(folder, kind, network):
    assert file_system(Path(folder), MOUNTS) == kind
    assert is_network(kind) == network
