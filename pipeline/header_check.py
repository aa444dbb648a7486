"""The last look at a sample before a decoder sees it: its header against limits and index.

A decoder reserves what a header claims, so a few hundred bytes can ask for gigabytes. Pictures that
make_shards wrote have been decoded once; those of foreign shards nobody has looked at.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.picture_header import (
    EMPTY,
    UNKNOWN,
    BadHeaderError,
    Buffer,
    PictureHeader,
    read_header,
)
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.validate import Limits, RefusedError, check_bytes, check_scans, check_size

Bytes = NDArray[np.uint8]


class CheckedPicture(NamedTuple):
    """Encoded bytes that may be decoded, and what the decoder will make of them."""

    picture: Bytes
    width: int
    """Pixels, as stored (EXIF rotation is not applied)."""
    height: int
    """Likewise."""


def checked_picture(store: ShardStore, shard: int, index: int, limits: Limits) -> CheckedPicture:
    """A sample whose header is within the limits and says what the index says.

    An index without the size (0 x 0: whoever wrote it could not read the header, or it exceeds 16
    bits) leaves the header's.

    Args:
        store: the shards.
        shard: number of the shard.
        index: of the sample in it.
        limits: of bytes, looked at before any is read, and of pixels and sides.

    Raises:
        BadSampleError: if it cannot be used; the message is the reason.
    """
    record = store.records(shard)[index]
    try:
        check_bytes(int(record["size"]), limits)
    except RefusedError as error:
        raise BadSampleError(str(error)) from error
    picture = store.picture(shard, index)
    header, problem = judge_header(picture, limits)
    if header is None or problem:
        raise BadSampleError(problem)
    width, height = int(record["width"]), int(record["height"])
    if width and height and (width, height) != (header.width, header.height):
        raise BadSampleError(
            f"another size: its header says {header.width}x{header.height} pixels, "
            f"its index {width}x{height}"
        )
    return CheckedPicture(picture, header.width, header.height)


def judge_header(picture: Buffer, limits: Limits) -> tuple[PictureHeader | None, str]:
    """The header, if it can be read, and why the picture may not be decoded ("" where it may).

    Args:
        picture: encoded bytes.
        limits: of pixels and sides.
    """
    try:
        header = read_header(picture)
    except BadHeaderError as error:
        kind = "" if str(error) in (EMPTY, UNKNOWN) else "damaged header: "
        return None, f"{kind}{error}"
    try:
        check_size(header.width, header.height, limits)
        check_scans(header, picture)
    except RefusedError as error:
        return header, str(error)
    return header, ""
