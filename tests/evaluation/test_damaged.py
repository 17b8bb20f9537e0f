"""evaluation/images.py: an .npz that was damaged, or that claims more than it has."""

import fcntl
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from comparing import save, toy_network

from evaluation import images
from support.lock import one_writer


def header(shape, dtype="|u1", fortran=False):
    """The header of a .npy file."""
    f = io.BytesIO()
    fields = {"descr": dtype, "fortran_order": fortran, "shape": shape}
    np.lib.format.write_array_header_1_0(f, fields)
    return f.getvalue()


def pack(file, members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, "w", kind) as z:
        for name, content in members.items():
            z.writestr(f"{name}.npy", content)
    return file


def refused(file, *words):
    """It is refused in one line that names the file, and in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as e:
            sum(len(x) for x in images.read_npz(file).rows(16))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    text = str(e.value)
    assert file.name in text and "\n" not in text and all(word in text for word in words), text


TB = 10**12
CLAIMS = [
    ("arr_0", (8 * TB // 192, 8, 8, 3), "|u1"),
    ("arr_0", (8 * TB,), "<f8"),
    ("arr_0", (2**40, 2**40, 2**40, 3), "|u1"),
    ("arr_0", (-1, 8, 8, 3), "|u1"),
    ("mu", (TB,), "<f8"),
    ("sigma", (10**6, 10**6), "<f8"),
    ("labels", (TB,), "<i8"),
    ("settings", (), f"<U{10**9}"),
    ("channels", (TB,), "<i8"),
]


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name, shape, dtype", CLAIMS)
def test_a_header_that_claims_terabytes_is_refused(tmp_path, name, shape, dtype, kind):
    good = header((4, 8, 8, 3)) + bytes(4 * 8 * 8 * 3)
    file = pack(tmp_path / "s.npz", {"arr_0": good, name: header(shape, dtype)}, kind)
    assert file.stat().st_size < 2000
    refused(file, name)


def grow(file, size):
    """Let the directory of a zip file claim that its first member has so many bytes."""
    whole = bytearray(file.read_bytes())
    start = whole.index(b"PK\1\2")
    whole[start + 24 : start + 28] = struct.pack("<I", size)
    file.write_bytes(whole)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_directory_that_claims_gigabytes_is_refused(tmp_path, kind):
    """Header and directory agree; the file has a few bytes."""
    head = header((20_000_000, 8, 8, 3))
    file = pack(tmp_path / "s.npz", {"arr_0": head}, kind)
    grow(file, len(head) + 20_000_000 * 192)
    refused(file, "arr_0")


def test_another_compression_is_refused(tmp_path):
    good = header((4, 8, 8, 3)) + bytes(4 * 8 * 8 * 3)
    refused(pack(tmp_path / "s.npz", {"arr_0": good}, zipfile.ZIP_BZIP2), "compressed in a way")


OTHERS = [
    ("settings", np.array(["{}"]), "settings is"),
    ("settings", np.array(3), "settings is"),
    ("settings", np.array("[" * 10_000), "recursion"),
    ("channels", np.array([1, 3]), "channels is"),
    ("channels", np.array(2), "expected 1 or 3"),
    ("channels", np.array("3"), "channels is"),
    ("channels", np.array(1.0), "channels is"),
    ("mu", np.array(["a"]), "mu and sigma are no mean"),
    ("mu", np.zeros(2, int), "mu and sigma are no mean"),
    ("mu", np.array(1.0), "mu and sigma are no mean"),
    ("labels", np.array([{}]), "labels holds Python objects"),
]


@pytest.mark.parametrize("name, value, message", OTHERS)
def test_what_stands_beside_the_images_is_checked(tmp_path, name, value, message):
    x = np.zeros((4, 8, 8, 3), np.uint8)
    more = {"mu": np.zeros(2), "sigma": np.eye(2), name: value}
    refused(save(tmp_path / "s.npz", x, **more), message)


def test_statistics_in_fortran_order_are_read(tmp_path):
    sigma = np.arange(9.0).reshape(3, 3)
    file = tmp_path / "s.npz"
    np.savez(file, mu=np.zeros(3), sigma=np.asfortranarray(sigma))
    assert np.array_equal(images.read_npz(file).more["sigma"], sigma)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["arr_0", "labels", "settings", "mu", "sigma"])
def test_a_flipped_bit_in_any_array_is_told_by_its_crc(tmp_path, name, compressed):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    beside = {"labels": np.arange(40), "settings": np.array('{"cfg": 1.5}')}
    statistics = {"mu": rng.random(5), "sigma": np.eye(5)}
    file = save(tmp_path / "s.npz", x, compressed, **beside, **statistics)
    with zipfile.ZipFile(file) as z:
        info = z.getinfo(f"{name}.npy")
    start = info.header_offset + 30 + len(info.filename)  # and an extra field
    end = info.header_offset + 30 + len(info.filename) + 20 + info.compress_size
    whole = file.read_bytes()
    for at in np.linspace((start + end) // 2, end - 25, 5).astype(int):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        refused(file)


@pytest.mark.parametrize("compressed", [False, True])
def test_mutated_files_are_refused_in_one_line_or_are_as_they_were(tmp_path, compressed):
    rng, counts = np.random.default_rng(compressed), {"refused": 0, "held": 0}
    x = rng.integers(0, 4, (9, 8, 8, 3), dtype=np.uint8)
    file = save(tmp_path / "s.npz", x, compressed, mu=np.zeros(3), sigma=np.eye(3))
    whole = file.read_bytes()
    for _ in range(300):
        b = bytearray(whole)
        i, j = sorted(rng.integers(0, len(b), 2))
        kind = rng.integers(4)
        if kind == 0:
            b[i] ^= 1 << rng.integers(8)
        elif kind == 1:
            b[i : i + 4] = rng.bytes(4)
        elif kind == 2:
            del b[i : min(j, i + 50)]
        else:
            del b[i:]
        file.write_bytes(b)
        try:
            read = images.read_npz(file)
            got = np.concatenate(list(read.rows(4)))
        except ValueError as e:
            assert str(e).startswith(str(file)) and "\n" not in str(e), repr(e)
            counts["refused"] += 1
        else:
            assert np.array_equal(got, x) and (read.more["sigma"] == np.eye(3)).all()
            counts["held"] += 1
    print(f"compressed {compressed}", counts)
    assert counts["refused"] > 200


# --------------------------------------------------------------------------------------------------
# One writer for each reference.


def test_a_reference_has_one_writer(colours, toy, command, tmp_path):
    file = tmp_path / "ref.npz"
    with one_writer(file):
        assert command(colours[3], "--make-reference", file)[0] == 0  # nested: the same process
    assert [p.name for p in tmp_path.glob("ref*")] == ["ref.npz"]


def test_a_second_writer_of_a_reference_is_told_who_is_there(colours, toy, command, tmp_path):
    file = tmp_path / "ref.npz"
    lock = tmp_path / "ref.npz.lock"
    lock.write_text("process 7 on elsewhere since yesterday\n")
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = command(colours[3], "--make-reference", file)
    assert code == 2 and err.count("\n") == 1
    assert "ref.npz is being written by process 7 on elsewhere since yesterday" in err
    assert not file.exists() and not [*tmp_path.glob("*.tmp")]


def test_a_folder_is_no_reference_file(colours, tmp_path):
    with pytest.raises(ValueError, match="is a folder; a reference is a file"):
        images.make_reference(images.read_npz(colours[3]), tmp_path, toy_network())


def test_another_process_temporary_file_stays(colours, toy, command, tmp_path):
    (tmp_path / "ref.npz.1.tmp").write_bytes(b"of another process")
    assert command(colours[3], "--make-reference", tmp_path / "ref.npz")[0] == 0
    assert (tmp_path / "ref.npz.1.tmp").read_bytes() == b"of another process"
