"""Kinds of files that are not supported: the first bytes identify each kind, and the message names a remedy."""

import bz2
import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from jitscale.preparation.finding import find_sources
from tests.preparation.inputs import tree
from tests.preparation.packing_jobs import alone, refused_input, said
from tests.support.pictures import file_bytes, noise

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
# A record of 5 bytes as TensorFlow's TFRecordWriter writes it: length, checksum, ...
TFRECORD = bytes.fromhex("0500000000000000eab2043e") + b"hello" + bytes(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"x"), "is compressed with gzip; gunzip it"),
        (bz2.compress(b"x"), "is compressed with bzip2; bunzip2 it"),
        (lzma.compress(b"x"), "is compressed with xz; unxz it"),
        (b"\x28\xb5\x2f\xfdx", "is compressed with zstd; unzstd it"),
        (b"\x04\x22\x4d\x18x", "is compressed with lz4; unlz4 it"),
        (b"Rar!\x1a\x07\x01\0", "is a rar archive; unpack it and give the folder"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive; unpack it and give the folder"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, which is not read; load its images and write them with numpy.savez"),
        (b"MATLAB 5.0 MAT-file", "is a MATLAB file, which is not read"),
        (b"\x93NUMPY\1\0", "is one numpy array; write it with its labels as numpy.savez"),
        (b"<!DOCTYPE html><title>Log in", "is a web page, not the data; download it again"),
        (b"\x80\x04\x95\0", "is a pickle, which can run any code and is never opened; load"),
        (
            bytes(16) + b"\xde\xc0\xef\xbe",
            "is an LMDB database, as LSUN has them, which is not read; export its images",
        ),
        (TFRECORD, "is a TFRecord file, which is not read; write its images as files"),
        (POINTER, f"is a git-lfs pointer of {len(POINTER)} bytes, not the data; run git lfs pull"),
        *((file_bytes(noise(0), form), "is one picture; give its folder") for form in ("PNG", "JPEG", "WEBP", "BMP")),
        *((file_bytes(noise(0), form), "is one picture; give its folder") for form in ("GIF", "TIFF")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_kinds_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    """The name of the file does not matter. The same holds for a file in a folder."""
    path = tmp_path / "in" / "deep" / "some.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert f"{path}: {message}" in refused_input("--input", path)
    path = path.rename(path.with_name("some.dat"))
    assert f"{path}: {message}" in refused_input("--input", tmp_path / "in")


def test_a_folder_of_unsupported_pictures(tmp_path: Path) -> None:
    tree(tmp_path, "cat/a.bmp", "dog/b.bmp", "dog/c.tif")
    (tmp_path / "cat" / "a.bmp").write_bytes(file_bytes(noise(0), "BMP"))
    line = refused_input("--input", tmp_path)
    assert f"{tmp_path}: no image of a kind that is read, but .bmp 2, .tif 1; convert these images to .png" in line


def test_a_file_of_unknown_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"", b"BMI,height\n", TFRECORD[:11] + b"x", bytes(3072)):
        path.write_bytes(content)
        assert f"{path}: is neither a folder, a .tar" in refused_input("--input", path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "a.bin")
    assert "folder: no image in it, but .bin 1" in refused_input("--input", tmp_path / "folder")
    # Next to images such files are ignored, whatever their kind.
    for name in ("batch.bin", "a.npz", "b.npz"):
        (tmp_path / "folder" / name).write_bytes(bytes(3073) if name == "batch.bin" else b"x")
    np.savez(tmp_path / "folder" / "b.npz", data=np.zeros((1, 3), np.uint8))
    tree(tmp_path / "folder", "x.png")
    assert find_sources([str(tmp_path / "folder")]).ignored == {"bin": 2, "npz": 2}


def test_images_that_are_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    tree(tmp_path / "in", *(f"cat/{number:02d}.jpg" for number in range(11)))
    for path in (tmp_path / "in" / "cat").iterdir():
        path.write_bytes(POINTER)
    finished = alone(tmp_path / "in", tmp_path / "out")
    assert finished.code == 2
    assert f"is a git-lfs pointer of {len(POINTER)} bytes, not the data; run git lfs pull" in said(finished.err)
