"""Which source a word on the command line stands for."""

import sys
from pathlib import Path

from pipeline.archive_sources import tar_files, tar_source
from pipeline.program import InputError
from pipeline.sources import Source, SourceConfig, image_folder
from pipeline.table_sources import TABLE_SUFFIXES, list_source, table_source
from pipeline.torchvision_source import SCHEME, torchvision_source


def open_source(source: str, config: SourceConfig) -> Source:
    """The source of that name.

    Raises:
        InputError: if it is not there.
    """
    if source == "-":
        return list_source(sys.stdin, config)
    if source.startswith(SCHEME):
        return torchvision_source(source, config)
    place = Path(source)
    if place.suffix.lower() in TABLE_SUFFIXES and not place.is_dir():
        return table_source(place, config)
    if tars := tar_files(place):
        return tar_source(place, tars, config)
    if config.labels:
        raise InputError(f"--labels {config.labels}: only a tar of pictures takes its labels so")
    return image_folder(place)
