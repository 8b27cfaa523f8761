"""Files come whole or not at all, whatever the server, the disk or another process does."""

import hashlib
import http.server
import importlib.util
import multiprocessing
import os
import shutil
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from scbert import download

CONTENT = bytes(range(256)) * 400  # 102,400 bytes


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as the first folder of the path says, and counts the requests."""

    asked = []

    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        how = self.path.split("/")[1]
        self.asked.append(self.path)
        first = self.asked.count(self.path) == 1
        if how == "missing":
            return self.send_error(404)
        if how == "busy" or (how == "busy-once" and first):
            return self.send_error(503)
        body = CONTENT
        if how == "wrong":
            body = CONTENT[:-1] + b"!"
        if how == "slow":
            time.sleep(0.3)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) // 2 if how == "truncated" else len(body)))
        self.end_headers()
        if how == "dropped" or (how == "dropped-once" and first):
            body = body[: len(body) // 2]
        self.wfile.write(body[: len(body) // 2] if how == "truncated" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache and no mirror; and no waiting between attempts."""
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SCBERT_MIRROR", raising=False)
    monkeypatch.setattr(download, "PAUSE", 0.01)
    Server.asked.clear()
    return tmp_path / "cache"


def make_entry(url):
    return {"url": url, "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}


def kept(cache):
    """The files in the cache, without the locks."""
    return [path for path in cache.rglob("*") if path.is_file() and ".locks" not in path.parts]


def test_a_file_is_downloaded_once_and_then_taken_from_the_cache(address, cache):
    entry = make_entry(f"{address}/good/set.bin")
    path = download.fetch_file(entry, progress=False)
    assert path == cache / "good" / "set.bin"
    assert path.read_bytes() == CONTENT
    assert download.fetch_file(entry, progress=False) == path
    assert len(Server.asked) == 1
    assert kept(cache) == [path]


def test_a_git_blob_id_is_enough_to_verify(address, cache):
    blob = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    entry = {"url": f"{address}/good/set.bin", "bytes": None, "git_blob": blob}
    assert download.fetch_file(entry, progress=False).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="another hash"):
        download.fetch_file({**entry, "url": f"{address}/wrong/set.bin"}, progress=False)


@pytest.mark.parametrize(
    ("how", "message", "n_asked"),
    [
        ("wrong", r"in 3 attempts: what came, 102,400 bytes, has another hash than the pinned file", 3),
        ("truncated", r"in 3 attempts: what came, 51,200 bytes, has another hash", 3),
        ("dropped", r"in 3 attempts: the connection broke or could not be made \(", 3),
        ("busy", r"in 3 attempts: the server answers 503 Service Unavailable", 3),
        ("missing", r"could not be fetched from http://[^ ]+: the server answers 404 Not Found", 1),
    ],
)
def test_what_goes_wrong_is_one_sentence_and_nothing_is_kept(address, cache, how, message, n_asked):
    with pytest.raises(ValueError, match=message) as error:
        download.fetch_file(make_entry(f"{address}/{how}/set.bin"), progress=False)
    assert "Nothing was kept; try again later, or put the file below a folder as" in str(error.value)
    assert len(Server.asked) == n_asked
    assert kept(cache) == []


@pytest.mark.parametrize("how", ["busy-once", "dropped-once"])
def test_a_passing_fault_is_tried_again(address, cache, how):
    path = download.fetch_file(make_entry(f"{address}/{how}/set.bin"), progress=False)
    assert path.read_bytes() == CONTENT
    assert len(Server.asked) == 2


def test_a_server_that_is_not_there_is_one_sentence(cache):
    with pytest.raises(ValueError, match="the connection broke or could not be made"):
        download.fetch_file(make_entry("http://127.0.0.1:9/set.bin"), progress=False)
    assert kept(cache) == []


def test_no_room_is_said_before_the_download(address, cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(
        ValueError, match=r"set.bin takes 102.4 kB, but .* has 1.0 kB left: free some room, or set SCBERT_C"
    ):
        download.fetch_file(make_entry(f"{address}/good/set.bin"), progress=False)
    assert Server.asked == []


def test_a_disk_that_fills_up_in_between_keeps_nothing(address, cache):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    entry = make_entry(f"{address}/good/set.bin")
    full = cache / "good"
    full.mkdir(parents=True)
    (full / f".set.bin.{os.getpid()}.part").symlink_to("/dev/full")  # each write to it says: no space left
    with pytest.raises(ValueError, match="The disk is full: set.bin could not be kept in .*; free some room, or set"):
        download.fetch_file(entry, progress=False)
    assert kept(cache) == []


def test_what_a_killed_process_left_behind_is_removed(address, cache):
    (cache / "good").mkdir(parents=True)
    (cache / "good" / ".set.bin.99999999.part").write_bytes(CONTENT[:100])
    path = download.fetch_file(make_entry(f"{address}/good/set.bin"), progress=False)
    assert kept(cache) == [path]


def test_a_cache_that_cannot_be_written_is_one_sentence(address, cache, monkeypatch):
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("SCBERT_CACHE", str(cache.parent / "file"))
    with pytest.raises(
        ValueError, match=r"Nothing can be kept in the cache .*file \(.+\): free some room, or set SCBERT"
    ):
        download.fetch_file(make_entry(f"{address}/good/set.bin"), progress=False)


def test_a_damaged_copy_in_the_cache_is_replaced(address, cache):
    entry = make_entry(f"{address}/good/set.bin")
    path = download.fetch_file(entry, progress=False)
    path.write_bytes(CONTENT[:1000])
    assert download.fetch_file(entry, progress=False).read_bytes() == CONTENT
    assert len(Server.asked) == 2


def test_the_mirror_goes_first_and_must_hold_the_pinned_file(address, tmp_path, monkeypatch):
    entry = make_entry(f"{address}/missing/set.bin")
    copy = tmp_path / "mirror" / "missing" / "set.bin"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(CONTENT)
    monkeypatch.setenv("SCBERT_MIRROR", str(tmp_path / "mirror"))
    assert download.fetch_file(entry) == copy
    copy.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="in the mirror, is not the pinned file"):
        download.fetch_file(entry)
    monkeypatch.setenv("SCBERT_MIRROR", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="SCBERT_MIRROR names .*nowhere, which is no folder"):
        download.fetch_file(entry)
    assert Server.asked == []


def test_a_mirror_on_the_web_takes_the_place_of_the_host(address, cache, monkeypatch):
    monkeypatch.setenv("SCBERT_MIRROR", f"{address}/good/")
    path = download.fetch_file(make_entry("https://example.invalid/folder/set.bin"), progress=False)
    assert path == cache / "folder" / "set.bin"
    assert Server.asked == ["/good/folder/set.bin"]


def _fetch(entry, results):
    results.put(str(download.fetch_file(entry, progress=False)))


def test_two_processes_that_want_one_file_download_it_once(address, cache):
    entry = make_entry(f"{address}/slow/set.bin")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_fetch, args=(entry, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert set(found) == {str(cache / "slow" / "set.bin")}
    assert Path(found[0]).read_bytes() == CONTENT
    assert len(Server.asked) == 1
    assert kept(cache) == [Path(found[0])]


def test_the_bar_shows_the_name_and_a_rate(address, capsys):
    download.fetch_file(make_entry(f"{address}/good/set.bin"))
    shown = capsys.readouterr()
    assert "set.bin: 100%" in shown.out
    assert "B/s" in shown.out
    assert shown.err == ""


# A file in a wheel.


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The entry of a file in a wheel that pip finds in a folder, without the network."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data/set.bin", CONTENT)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return make_entry("wheel:tiny==1.0/tiny/data/set.bin") | {
        "wheel_sha256": hashlib.sha256(path.read_bytes()).hexdigest()
    }


def test_a_file_of_a_wheel_is_taken_out_and_the_wheel_is_not_installed(wheel, cache):
    path = download.fetch_file(wheel, progress=False)
    assert path == cache / "wheels" / "tiny-1.0" / "tiny" / "data" / "set.bin"
    assert path.read_bytes() == CONTENT
    assert kept(cache) == [path]
    assert importlib.util.find_spec("tiny") is None


def test_a_wheel_with_another_hash_is_refused_in_the_words_of_pip(wheel, cache):
    with pytest.raises(
        ValueError, match=r"set.bin could not be fetched from wheel:tiny==1.0\S+ in 3 attempts: pip says"
    ):
        download.fetch_file(wheel | {"wheel_sha256": "0" * 64}, progress=False)
    assert kept(cache) == []


def test_a_file_of_a_wheel_is_found_in_a_mirror(wheel, tmp_path, monkeypatch):
    path = tmp_path / "mirror" / "wheels" / "tiny-1.0" / "tiny" / "data" / "set.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    monkeypatch.setenv("SCBERT_MIRROR", str(tmp_path / "mirror"))
    assert download.fetch_file(wheel, progress=False) == path
