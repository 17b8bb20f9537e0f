"""support/prepared.py: the table of data/README.md, enforced; what files may claim."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import CONFIG, ROOT, write_set

from dydilit import PRESETS
from support import prepared
from support.prepared import check_set, read_meta, read_set

GREY = np.zeros((12, 1, 8, 8), np.uint8)
LABELS = np.zeros(12, np.int64)
LATENTS = {"vae": "a/vae", "scaling": 0.3, "pixels": 64}


@pytest.fixture
def pixels(tmp_path):
    return write_set(tmp_path / "set", GREY, LABELS)


@pytest.fixture
def latents(tmp_path):
    return write_set(tmp_path / "set", np.zeros((12, 1, 8, 8, 8), np.float16), LABELS, **LATENTS)


def refused(folder, file, *words):
    """read_set, and check_set through it, say in one line what is wrong with a file."""
    with pytest.raises(ValueError) as e:
        read_set(folder)
    text = str(e.value)
    assert str(folder / file) in text and "\n" not in text and len(text) < 400
    assert all(word in text for word in words), text
    with pytest.raises(ValueError, match=re.escape(text)):
        check_set(folder, CONFIG)


def change(folder, **fields):
    """Change fields of meta.json; ... removes one."""
    meta = json.loads((folder / "meta.json").read_text()) | fields
    meta = {k: v for k, v in meta.items() if v is not ...}
    (folder / "meta.json").write_text(json.dumps(meta))


# --------------------------------------------------------------------------------------------------
# Fields.

WRONG = {
    "name": [3, None, ["digits"], "\ud800"],
    "classes": [[], 10, "abc", {"a": 1}, ["a", 3], [None], None, ["\udc00"]],
    "flip": [0, 1, "true", None, []],
    "held_out": [-5, "4", 0.1, 1.0, True, None, [1], 12, 10**30],
    "levels": [0, -1, "255", True, None, float("nan"), float("inf"), 10**400],
}
WRONG_OF_LATENTS = {
    "vae": [3, None, [], {}],
    "scaling": [0, -0.2, "0.18215", True, None, float("nan"), float("inf"), [0.2]],
    "pixels": [0, -1, 64.0, "64", True, None],
    "class_seed": [0.5, "0", True, None],
}


def pairs(table):
    return [(field, value) for field, values in table.items() for value in values]


def short(value):
    return ascii(value)[:20]


@pytest.mark.parametrize("field, value", pairs(WRONG), ids=short)
def test_a_field_of_another_type_or_range_is_named(pixels, field, value):
    change(pixels, **{field: value})
    refused(pixels, "meta.json", f": {field} is ", "expected")


@pytest.mark.parametrize("field, value", pairs(WRONG_OF_LATENTS), ids=short)
def test_a_field_of_latents_of_another_type_or_range_is_named(latents, field, value):
    change(latents, **{field: value})
    refused(latents, "meta.json", f": {field} is ", "expected")


@pytest.mark.parametrize("field", WRONG)
def test_a_missing_field_is_named(pixels, field):
    change(pixels, **{field: ...})
    refused(pixels, "meta.json", f"has no field {field}, expected")


@pytest.mark.parametrize("field", ["vae", "pixels"])
def test_a_missing_field_of_latents_is_named(latents, field):
    read_set(latents)
    change(latents, **{field: ...})
    refused(latents, "meta.json", f"has no field {field}, expected")


def test_the_table_of_the_readme_is_the_one_that_is_enforced():
    text = (ROOT / "data" / "README.md").read_text()
    table = text.split("| field of `meta.json` |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert named == [*prepared.FIELDS, *prepared.FIELDS_OF_LATENTS, *prepared.OPTIONAL]


NO_JSON = [
    b"",
    b"{",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"\x80",
    b"[" * 100_000,
    b"{'name': 1}",
    b'{"held_out": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("content", NO_JSON, ids=short)
def test_a_meta_json_that_is_no_json_is_named(pixels, content):
    (pixels / "meta.json").write_bytes(content)
    refused(pixels, "meta.json", "is no JSON in UTF-8")


@pytest.mark.parametrize("content", ["3", "null", "[]", '"text"', "true", "NaN"])
def test_a_meta_json_that_is_no_object_is_named(pixels, content):
    (pixels / "meta.json").write_text(content)
    refused(pixels, "meta.json", "expected an object")


def test_prepared_sets_hold(pixels, digits):
    meta, images, labels = read_set(digits)
    assert meta == read_meta(digits) and images.shape == (1797, 1, 8, 8)
    assert isinstance(images, np.memmap) and not images.flags.writeable and labels.max() == 9
    change(pixels, more=[1], class_seed=-3, levels=0.5)
    read_set(pixels)


# --------------------------------------------------------------------------------------------------
# Arrays.

IMAGES = [
    np.zeros((12, 2, 8, 8), np.uint8),
    np.zeros((12, 4, 8, 8), np.uint8),
    np.zeros((12, 0, 8, 8), np.uint8),
    np.zeros((0, 1, 8, 8), np.uint8),
    np.zeros((12, 1, 8), np.uint8),
    np.zeros((12, 1, 1, 8, 8), np.uint8),
    np.zeros((12, 1, 8, 8), np.int8),
    np.zeros((12, 1, 8, 8), bool),
    np.zeros((12, 1, 8, 8), np.float16),
    np.zeros((), np.uint8),
]
IMAGES_OF_LATENTS = [
    np.zeros((12, 1, 7, 8, 8), np.float16),
    np.zeros((12, 2, 8, 8, 8), np.float16),
    np.zeros((12, 8, 8, 8), np.float16),
    np.zeros((12, 1, 8, 8, 8), np.float32),
    np.zeros((12, 1, 8, 8, 8), ">f2"),
    np.zeros((12, 1, 8, 8), np.uint8),
]
OTHER_LABELS = [
    LABELS.astype(np.float32),
    LABELS.astype(bool),
    LABELS.astype(np.int32),
    LABELS.astype(np.uint64),
    LABELS.astype(">i8"),
    LABELS[:11],
    LABELS[:0],
    LABELS[:, None],
    np.zeros(13, np.int64),
    np.array("text"),
]


def layout(x):
    return f"{x.dtype} {x.shape}"


@pytest.mark.parametrize("images", IMAGES, ids=layout)
def test_images_of_another_layout_are_named(pixels, images):
    np.save(pixels / "images.npy", images)
    refused(pixels, "images.npy", f"is {layout(images)}, expected uint8 (N, C, H, W)")


@pytest.mark.parametrize("images", IMAGES_OF_LATENTS, ids=layout)
def test_latents_of_another_layout_are_named(latents, images):
    np.save(latents / "images.npy", images)
    refused(latents, "images.npy", f"is {layout(images)}, expected float16 (N, 1, 2C, h, w)")


@pytest.mark.parametrize("labels", OTHER_LABELS, ids=layout)
def test_labels_of_another_layout_are_named(pixels, labels):
    np.save(pixels / "labels.npy", labels)
    refused(pixels, "labels.npy", f"is {layout(labels)}, expected int64 (12,)")


@pytest.mark.parametrize("label", [10, -1, 2**63 - 1, -(2**63)])
def test_labels_out_of_range_are_named(pixels, label):
    np.save(pixels / "labels.npy", np.where(np.arange(12) == 5, label, LABELS))
    refused(pixels, "labels.npy", "expected 0 .. 9, the indices of classes in meta.json")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
def test_another_kind_of_file_is_named(pixels, name):
    np.savez(pixels / "x.npz", a=LABELS)
    np.save(pixels / "objects.npy", np.array([{}, None]), allow_pickle=True)
    for other in ("x.npz", "objects.npy", "meta.json"):
        shutil.copy(pixels / other, pixels / name)
        refused(pixels, name, "Python objects" if other == "objects.npy" else "is no .npy array")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
def test_a_missing_file_is_named(pixels, name):
    (pixels / name).unlink()
    for read in (read_set, lambda folder: check_set(folder, CONFIG)):
        with pytest.raises(OSError, match=re.escape(str(pixels))):
            read(pixels)


HUGE = [(10**15, 1, 8, 8), (2**62, 4, 8, 8), (10**30, 1, 8, 8), (12, -1, 8, 8), (True, 1, 8, 8)]


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_a_header_that_claims_more_than_there_is_is_named(pixels, shape):
    with open(pixels / "images.npy", "wb") as f:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
    refused(pixels, "images.npy")


def mutated(whole, rng):
    """Some bytes, changed in one of five ways."""
    b = bytearray(whole)
    i, j = sorted(rng.integers(0, len(b), 2))
    kind = rng.integers(5)
    if kind == 0:
        b[i] ^= 1 << rng.integers(8)
    elif kind == 1:
        b[i : i + 4] = rng.bytes(4)
    elif kind == 2:
        del b[i : min(j, i + 50)]
    elif kind == 3:
        b[i:i] = rng.choice(list(b'0123456789-.eE"[]{},: '), 3).astype(np.uint8).tobytes()
    else:
        del b[i:]
    return bytes(b)


@pytest.mark.parametrize("name", ["meta.json", "labels.npy", "images.npy"])
def test_mutated_files_are_refused_in_one_line_or_hold(latents, name):
    whole, rng = (latents / name).read_bytes(), np.random.default_rng(len(name))
    part = whole if name == "meta.json" else whole[:128]  # of values only the header can be told
    counts = {"refused": 0, "held": 0}
    for _ in range(300):
        (latents / name).write_bytes(mutated(part, rng) + whole[len(part) :])
        try:
            meta, images, labels = read_set(latents)
        except (ValueError, OSError) as e:
            assert str(latents) in str(e) and "\n" not in str(e), repr(e)
            counts["refused"] += 1
        else:
            assert len(images) == len(labels) == 12
            assert 0 <= meta["held_out"] < 12 and labels.max() < len(meta["classes"])
            counts["held"] += 1
    print(name, counts)
    assert counts["refused"] > 30


def test_a_path_with_spaces_is_quoted_in_the_command(tmp_path):
    with pytest.raises(FileNotFoundError) as e:
        check_set(tmp_path / "my photos", PRESETS["pixels32"])
    words = shlex.split(str(e.value).split("make it: ")[1])
    assert Path(words[-1]) == tmp_path / "my photos"
