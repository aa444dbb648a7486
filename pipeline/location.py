"""Where shards lie: a local folder or a URL, and which URLs there are.

A URL is handed to a client library and never to a shell, so ``pipe:`` and whatever else is not in
``SCHEMES`` is refused. Credentials come from the environment of that library, never from a URL,
which ends up in logs and in ``config.json``.
"""

import posixpath
import re
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.program import InputError

WRITABLE = ("s3://", "gs://")
SCHEMES = ("s3", "gs", "https", "http", "hf")
# One letter before the colon is a Windows drive.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
HF_FORM = "hf://datasets/ORG/NAME[@REVISION]/PATH"


def as_location(text: str | Path) -> Path | str:
    """A local folder as a path, a URL as text without a slash at its end.

    Raises:
        InputError: for a scheme that is not served, or a URL with more than scheme, host and path.
    """
    found = SCHEME.match(str(text))
    if found is None or isinstance(text, Path):
        return Path(text)
    scheme = found[1].lower()
    if scheme not in SCHEMES:
        raise InputError(
            f"{text}: {scheme}: is not served (nothing is ever run for a URL): give a folder or "
            f"one of {', '.join(f'{name}://' for name in SCHEMES)}; a folder with a colon in its "
            "name: ./NAME"
        )
    try:
        parts = urlsplit(text)
        has_user = parts.username is not None
    except ValueError as error:
        raise InputError(f"{text} is not a URL ({error})") from error
    if not text.startswith(f"{found[1]}://") or not parts.netloc:
        raise InputError(f"{text} is not a URL: {scheme}:// and a host or bucket come first")
    if has_user or parts.query or parts.fragment:
        raise InputError(
            f"{scheme}://{parts.hostname}...: leave user name, ? and # out of the URL; credentials "
            "belong into the environment"
        )
    if ".." in parts.path.split("/"):
        raise InputError(f"{text}: leave .. out of the URL")
    location = f"{scheme}://{parts.netloc}{parts.path}".rstrip("/")
    if scheme == "hf":
        split_hf(location)
    return location


def writable_location(url: str) -> str:
    """The URL, without a slash at its end.

    Raises:
        InputError: if it is not of a service that can be written to.
    """
    location = as_location(url)
    if not isinstance(location, str) or not location.startswith(WRITABLE):
        raise InputError(f"{url}: give s3:// or gs://, a bucket and a folder")
    return location


def is_url(text: str) -> bool:
    """Whether it begins like a URL that is served."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme in SCHEMES


def split_hf(url: str) -> tuple[str, str | None, str]:
    """Repository, revision and path of an ``hf://`` URL.

    Raises:
        InputError: if it is not one of a data set.
    """
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", url)
    if found is None:
        raise InputError(f"{url}: give {HF_FORM}")
    return found[1], found[2], found[3] or ""


def http_form(url: str) -> str:
    """The URL that a client is given: that of the hub for ``hf://``, else the same.

    The hub's address is ``HF_ENDPOINT``, as in its own library.
    """
    if not url.startswith("hf://"):
        return url
    # Here, because it takes 0.1 s to import, a quarter of what make_shards takes to start.
    from huggingface_hub import hf_hub_url

    repository, revision, path = split_hf(url)
    mark = "PATH"  # hf_hub_url wants a file and quotes it, the client quotes once more
    address = hf_hub_url(repository, mark, repo_type="dataset", revision=revision)
    return posixpath.join(address.removesuffix(f"/{mark}"), path).rstrip("/")


def tars_location(base: Path | str, tars: str) -> Path | str:
    """Where the tars of a manifest lie: ``Manifest.tars`` as seen from the manifest's own place.

    Raises:
        InputError: if it is no place that a set at ``base`` may point to.
    """
    if not tars:
        return base
    place = as_location(tars)
    if isinstance(base, Path):
        return place if isinstance(place, str) else base / place
    if isinstance(place, str):
        return place
    if place.is_absolute() or ".." in place.parts:
        raise InputError(f"{base}: its manifest says that its tars are in {tars}, a local folder")
    return f"{base}/{place.as_posix()}"
