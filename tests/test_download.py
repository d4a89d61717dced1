import errno
import hashlib
import http.server
import io
import logging
import random
import re
import tarfile
import threading
import zipfile

import pytest

from prts import download as module
from prts.data.tissue import SectionSpec
from prts.download import download, download_section
from prts.errors import InputError

BODY = bytes(range(256)) * 20_000  # 5 MB


class Server(http.server.ThreadingHTTPServer):
    """Serve `files`; `cut[name]` lists the bytes after which to drop each connection."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.etag, self.requests = {}, {}, '"v1"', []
        self.ranges, self.busy = True, 0

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/").split("?")[0]
        server.requests.append((name, self.headers.get("Range")))
        if server.busy:
            server.busy -= 1
            return self.send_error(503)
        if name not in server.files:
            return self.send_error(404)
        body, start = server.files[name], 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted[1])
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return None
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", server.etag)
        self.end_headers()
        cuts = server.cut.get(name)
        stop = start + cuts.pop(0) if cuts else len(body)
        self.wfile.write(body[start:stop])
        return None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def archive(*members, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            data = name.encode() * 1000
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)
    return buffer.getvalue()


def test_a_file_is_downloaded_once_and_verified(server, tmp_path):
    server.files["slide é.tif"] = server.files["slide%20%C3%A9.tif"] = BODY
    source = {
        "url": server.url("slide%20%C3%A9.tif"),
        "path": "lung one/slide é.tif",
        "sha256": hashlib.sha256(BODY).hexdigest(),
        "md5": None,
    }
    for _ in range(2):
        assert download([source], tmp_path) == [tmp_path / "lung one/slide é.tif"]
    assert (tmp_path / "lung one/slide é.tif").read_bytes() == BODY
    assert len(server.requests) == 1
    assert names(tmp_path) == ["lung one", "lung one/slide é.tif"]


def test_a_file_without_known_checksum_says_so(server, tmp_path, caplog):
    server.files["a.bin"] = BODY
    with caplog.at_level(logging.WARNING):
        download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)
    assert "no checksum is known" in caplog.text
    assert hashlib.sha256(BODY).hexdigest() in caplog.text


def test_a_dropped_connection_is_resumed(server, tmp_path):
    server.files["a.bin"], server.cut["a.bin"] = BODY, [2_000_000, 1_500_000]
    md5 = hashlib.md5(BODY).hexdigest()
    download([{"url": server.url("a.bin"), "path": "a.bin", "md5": md5}], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert server.requests == [("a.bin", None), ("a.bin", "bytes=2000000-"), ("a.bin", "bytes=3500000-")]
    assert names(tmp_path) == ["a.bin"]


def test_a_later_call_resumes_and_a_changed_file_starts_again(server, tmp_path):
    server.files["a.bin"], server.cut["a.bin"] = BODY, [1_000_000] + [0] * 5
    source = {"url": server.url("a.bin"), "path": "a.bin"}
    with pytest.raises(InputError, match="failed after 1 MB"):
        download([source], tmp_path)
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.tag"]
    server.requests.clear()
    download([source], tmp_path)
    assert server.requests == [("a.bin", "bytes=1000000-")]
    assert (tmp_path / "a.bin").read_bytes() == BODY

    (tmp_path / "a.bin").unlink()
    server.cut["a.bin"] = [1_000_000] + [0] * 5
    with pytest.raises(InputError):
        download([source], tmp_path)
    server.files["a.bin"], server.etag = BODY[::-1], '"v2"'
    download([source], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]


def test_a_server_without_ranges_restarts(server, tmp_path):
    server.files["a.bin"], server.cut["a.bin"], server.ranges = BODY, [1_000_000], False
    download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, extra):
    server.files["a.bin"] = BODY
    (tmp_path / "a.bin.part").write_bytes(BODY + extra)
    download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_busy_server_is_retried(server, tmp_path):
    server.files["a.bin"], server.busy = b"x", 2
    download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)
    server.busy = 100
    with pytest.raises(InputError, match="503"):
        download([{"url": server.url("a.bin"), "path": "b.bin"}], tmp_path)


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    server.files["a.bin"] = BODY
    with pytest.raises(InputError, match=r"a\.bin: the checksum is not md5:0123"):
        download([{"url": server.url("a.bin"), "path": "a.bin", "md5": "0123" * 8}], tmp_path)
    assert names(tmp_path) == []


def test_missing_file_and_no_server(server, tmp_path):
    with pytest.raises(InputError, match="404"):
        download([{"url": server.url("none.bin"), "path": "a.bin"}], tmp_path)
    url = server.url("a.bin")
    server.server_close()
    with pytest.raises(InputError, match="check the network"):
        download([{"url": url, "path": "a.bin"}], tmp_path)
    assert names(tmp_path) == []


def test_a_full_disk_is_reported_before_the_download(server, tmp_path, monkeypatch):
    server.files["a.bin"] = BODY
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match="disk is full"):
        download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)


def test_a_disk_that_fills_up_keeps_the_part(server, tmp_path, monkeypatch):
    server.files["a.bin"] = BODY

    def full(blocks, *args, **kwargs):
        yield next(iter(blocks))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "track", full)
    with pytest.raises(InputError, match="free some space"):
        download([{"url": server.url("a.bin"), "path": "a.bin"}], tmp_path)
    assert (tmp_path / "a.bin.part").stat().st_size == 1 << 20


def test_an_archive_unpacks_only_the_listed_members(server, tmp_path):
    server.files["x.tar.gz"] = archive("./bins/002/m.h5", "bins/002/spatial/p.json", "bins/0021/m.h5", "bins/008/m.h5")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/slide.tif").write_text("mine")
    source = {"url": server.url("x.tar.gz"), "path": "s", "unpack": ["bins/002"]}
    for _ in range(2):
        assert download([source], tmp_path) == [tmp_path / "s/bins/002"]
    kept = ["bins", "bins/002", "bins/002/m.h5", "bins/002/spatial", "bins/002/spatial/p.json", "slide.tif"]
    assert names(tmp_path / "s") == kept
    assert (tmp_path / "s/bins/002/m.h5").read_bytes() == b"./bins/002/m.h5" * 1000
    assert len(server.requests) == 1


def test_a_whole_archive_and_a_missing_member(server, tmp_path):
    server.files["x.tar.gz"] = archive("a/b.txt", "c.txt")
    for _ in range(2):
        download([{"url": server.url("x.tar.gz"), "path": "s", "unpack": True}], tmp_path)
    assert names(tmp_path / "s") == [".x.tar.gz.unpacked", "a", "a/b.txt", "c.txt"]
    assert len(server.requests) == 1
    with pytest.raises(InputError, match="does not contain bins/002"):
        download([{"url": server.url("x.tar.gz"), "path": "t", "unpack": ["bins/002"]}], tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:40] + b"\0" * 60 + b[100:], lambda b: b"<html>"]
)
def test_a_damaged_archive_leaves_nothing(server, tmp_path, damage):
    rng = random.Random(0)
    server.files["x.tar.gz"] = damage(archive(*(f"a/{rng.random()}" for _ in range(200))))
    with pytest.raises(InputError, match="damaged archive"):
        download([{"url": server.url("x.tar.gz"), "path": "s", "unpack": True}], tmp_path)
    assert names(tmp_path / "s") == []


@pytest.mark.parametrize(
    "body",
    [
        archive("ok.txt", "../../evil.txt"),
        archive("ok.txt", "/etc/evil.txt/../../../../evil.txt"),
        archive(link=("l", "/etc")),
    ],
    ids=["parent", "absolute", "link"],
)
def test_an_archive_cannot_write_outside_its_folder(server, tmp_path, body):
    server.files["x.tar.gz"] = body
    with pytest.raises(InputError, match="not safe"):
        download([{"url": server.url("x.tar.gz"), "path": "s/t", "unpack": True}], tmp_path)
    assert names(tmp_path) == ["s", "s/t", "s/t/x.tar.gz"]


def test_a_section_of_a_tissue_config(server, tmp_path):
    body = archive("binned_outputs/square_002um/m.h5", "binned_outputs/square_008um/m.h5")
    server.files["L_binned_outputs.tar.gz"], server.files["L_tissue_image.btf"] = body, b"image"
    node = {
        "folder": str(tmp_path / "L"),
        "urls": [server.url("L_binned_outputs.tar.gz"), server.url("L_tissue_image.btf")],
        "md5": {"L_binned_outputs.tar.gz": hashlib.md5(body).hexdigest()},
    }
    download_section(SectionSpec(name="lung1", download=node))
    assert (tmp_path / "L/L_tissue_image.btf").read_bytes() == b"image"
    assert names(tmp_path / "L/binned_outputs") == ["square_002um", "square_002um/m.h5"]
    with pytest.raises(InputError, match=r"section lung1\.download: is incomplete"):
        download_section(SectionSpec(name="lung1", download={"folder": "x"}))


@pytest.mark.parametrize("inner", ["", "outs/"])
def test_of_the_output_of_xenium_only_the_tables_are_kept(server, tmp_path, inner):
    tables = ["experiment.xenium", "cell_feature_matrix.h5", "cells.parquet", "nucleus_boundaries.parquet"]
    tables += ["cell_boundaries.parquet", "transcripts.parquet"]
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name in [*tables, "morphology.ome.tif", "../escaped"]:
            archive.writestr(f"{inner}{name}", name * 10)
    server.files = {"s_outs.zip": body.getvalue(), "s_he_image.ome.tif": b"image"}
    urls = [server.url(name) for name in server.files]
    spec = SectionSpec("s", download={"folder": str(tmp_path / "data"), "urls": urls})
    download_section(spec)
    kept = ["outs", *(f"outs/{name}" for name in tables), "s_he_image.ome.tif"]
    assert names(tmp_path / "data") == sorted(kept)
    assert (tmp_path / "data/outs/cells.parquet").read_text() == "cells.parquet" * 10
    assert names(tmp_path) == ["data", *sorted(f"data/{name}" for name in kept)]
    requests = len(server.requests)
    download_section(spec)
    assert len(server.requests) == requests
    server.files["t_outs.zip"] = body.getvalue()[:-30]
    with pytest.raises(InputError, match="damaged archive"):
        download_section(SectionSpec("t", download={"folder": str(tmp_path / "t"), "urls": [server.url("t_outs.zip")]}))
