"""The index of tar shards against tarfile itself, and damaged shards."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from corpora import tar_shards
from corpora.references import split_reference


def write_shard(path: Path, members: dict[str, bytes], format_: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format_) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


MEMBERS = {f"{'deep/' * (i % 30)}{i:06d}.jpg": bytes([i % 256]) * (i * 7) for i in range(200)}
MEMBERS["naïve 猫.png"] = b"cat"


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_found_with_its_bytes(tmp_path: Path, format_: int) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, MEMBERS, format_)
    scan = tar_shards.scan(shard)
    assert scan.damage is None
    assert [member.name for member in scan.members] == list(MEMBERS)
    for name, data in MEMBERS.items():
        location = tar_shards.locate(shard, name)
        assert location is not None
        assert tar_shards.read(shard, location) == data
    assert tar_shards.locate(shard, "no.jpg") is None


def test_a_shard_is_scanned_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, MEMBERS)
    scans: list[str | Path] = []
    scan = tar_shards.scan

    def counted(path: str | Path) -> tar_shards.Scan:
        scans.append(path)
        return scan(path)

    monkeypatch.setattr(tar_shards, "scan", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: tar_shards.locate(shard, name), list(MEMBERS) * 5))
    assert None not in found
    assert len(scans) == 1

    write_shard(shard, {"new.jpg": b"new"})
    location = tar_shards.locate(shard, "new.jpg")
    assert location is not None
    assert tar_shards.read(shard, location) == b"new"
    assert tar_shards.locate(shard, "000001.jpg") is None
    assert len(scans) == 2


def test_the_cache_forgets_the_shard_not_used_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "_indexes", type(tar_shards._indexes)())
    monkeypatch.setattr(tar_shards, "_MAX_CACHED_MEMBERS", 5)
    shards = [tmp_path / f"{i}.tar" for i in range(3)]
    for shard in shards:
        write_shard(shard, {"a.jpg": b"a", "b.jpg": b"b"})
        tar_shards.locate(shard, "a.jpg")
        tar_shards.locate(shards[0], "a.jpg")
    assert list(tar_shards._indexes) == [str(shards[2]), str(shards[0])]


def test_a_shard_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 512 + 1024 + 512 + 100])
    scan = tar_shards.scan(shard)
    assert [member.name for member in scan.members] == ["a.jpg"]
    assert scan.damage == "ends in the middle of b.jpg"


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    write_shard(shard, {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    data = bytearray(shard.read_bytes())
    data[512 + 1024 : 512 + 1024 + 512] = b"\xab" * 512
    shard.write_bytes(data)
    scan = tar_shards.scan(shard)
    assert [member.name for member in scan.members] == ["a.jpg"]
    assert scan.damage is not None
    assert scan.damage.startswith("damaged after a.jpg")


def test_links_folders_and_other_special_members_are_no_pictures(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    with tarfile.open(shard, "w") as archive:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert tar_shards.scan(shard).members == []


def test_what_is_no_plain_tar_file(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"hello " * 1000)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    for name in ("text.tar", "zipped.tar"):
        with pytest.raises(tar_shards.ShardError, match=f"{name}: not an uncompressed tar file"):
            tar_shards.scan(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        tar_shards.locate(tmp_path / "no.tar", "a.jpg")


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("a/0.tar#k.jpg", ("a/0.tar", "k.jpg")),
        ("a#b/0.tar#c/k#1.jpg", ("a#b/0.tar", "c/k#1.jpg")),
        ("a.TAR#k.jpg", ("a.TAR", "k.jpg")),
        ("a#b.jpg", None),
        ("a.tar", None),
        ("a.tar#", None),
    ],
)
def test_references(reference: str, parts: tuple[str, str] | None) -> None:
    assert split_reference(reference) == parts
