"""Files that a run reads back, changed at random: MUTATIONS=300 (default 6) times each, seeded.

A command that reads a changed file ends in one line, or with the result that the whole file gives.
It never ends in a traceback, a crash, a hang, or another result. What cannot be told is left out:
a file of torch.save that was loaded, changed in its values, and saved again.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CONFIG, RUN, differing, flags, parts, read_log, without_speed, write_set

import sample_min
import train_min
from support import pretrained

pytestmark = pytest.mark.usefixtures("cpu")
NUMBER = int(os.environ.get("MUTATIONS", 6))  # of each file
PATIENCE = 60  # seconds for one command


# --------------------------------------------------------------------------------------------------
# Changing bytes, JSON, and what torch.save wrote.


def flip(rng, raw, bits=1):
    raw = bytearray(raw)
    for _ in range(bits):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def cut(rng, raw):
    return raw[: rng.randrange(len(raw))]


def zeroed(rng, raw):
    n, at = rng.choice([1, 8, 64, 512, 4096]), rng.randrange(len(raw))
    return raw[:at] + bytes(len(raw[at : at + n])) + raw[at + n :]


def without_block(rng, raw):
    n, at = rng.choice([1, 8, 64, 512]), rng.randrange(len(raw))
    return raw[:at] + raw[at + n :]


def with_block(rng, raw):
    n, at = rng.choice([1, 8, 64, 512]), rng.randrange(len(raw) + 1)
    return raw[:at] + rng.randbytes(n) + raw[at:]


def swapped(rng, raw):
    n = rng.choice([8, 64, 512])
    a, b = sorted(rng.randrange(max(1, len(raw) - n)) for _ in range(2))
    if a + n > b:
        return flip(rng, raw)
    return raw[:a] + raw[b : b + n] + raw[a + n : b] + raw[a : a + n] + raw[b + n :]


def replaced(rng, raw):
    return rng.choice([b"", b"a text\n", bytes(len(raw)), rng.randbytes(100), b"\xff\xfe{}\n"])


def flips(rng, raw):
    return flip(rng, raw, bits=8)


BYTES = [flip, flip, flip, flips, cut, zeroed, without_block, with_block, swapped, replaced]
VALUES = [None, True, -5, 0, 3, 0.1, 10**9, 10**30, 1e308, "4", "", "none", [], {}, [3], {"a": 1}]


def places(tree):
    """(container, key) of every entry of nested dicts and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(entries):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def edited(rng, tree, values=VALUES):
    """One entry of a tree of dicts and lists is removed, or becomes another kind of value."""
    tree = json.loads(json.dumps(tree)) if values is VALUES else tree
    container, key = rng.choice(list(places(tree)))
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(values)
    return tree


def edited_json(rng, raw):
    return json.dumps(edited(rng, json.loads(raw))).encode()


def edited_line(rng, raw):
    lines = raw.splitlines(keepends=True)
    strange = [b"\n", b"3\n", b"{}\n", b"null\n", b'{"step": "1"}\n', b"[" * 100_000 + b"\n"]
    lines.insert(rng.randrange(len(lines) + 1), rng.choice([*strange, "\u00e9\n".encode("latin1")]))
    return b"".join(lines)


def edited_checkpoint(rng, raw):
    """An entry is removed or of another kind; a tensor is of another shape, dtype or order."""
    ckpt = torch.load(io.BytesIO(raw), weights_only=True)
    if rng.random() < 0.3:
        edited(rng, ckpt, [*VALUES, torch.zeros(3)])
    else:
        tensors = [(c, k) for c, k in places(ckpt) if isinstance(c[k], torch.Tensor)]
        container, key = rng.choice(tensors)
        z, (other, k) = container[key], rng.choice(tensors)
        changed = [z[None], z.reshape(-1)[:-1], z.double(), z.to(torch.int32), z.half(), z.tolist()]
        changed += [torch.zeros(7), torch.zeros(2, 3, 5), z.to_sparse(), z.to("meta"), None, ""]
        if z.dim() > 1 and z.shape[0] > 1 < z.shape[1]:
            changed.append(z.transpose(0, 1).contiguous().transpose(0, 1)[..., :-1])
        if other[k].shape != z.shape:
            changed.append(other[k])
        container[key] = rng.choice(changed)
    file = io.BytesIO()
    torch.save(ckpt, file)
    return file.getvalue()


# --------------------------------------------------------------------------------------------------
# Commands, each in a process of its own.


def quietly(action):
    """("refused", line), or ("done", None); any other exception is a traceback."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
        return "done", None
    except (ValueError, OSError, FloatingPointError) as e:  # what the scripts turn into a line
        return ("refused", str(e)) if "\n" not in str(e) else ("MORE THAN A LINE", str(e))
    except BaseException as e:
        return "TRACEBACK", f"{type(e).__name__}: {e}"


def in_a_child(action):
    """What `quietly` returns, from a fork, which may crash or hang."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(quietly(action), pipe)
        os._exit(0)
    os.close(writer)
    began = time.time()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.time() - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "HANG", None
        time.sleep(0.002)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return json.loads(text) if text else ("CRASH", None)


def mutate(tmp_path, whole, file, changes, command, result):
    """Print the outcomes of `command(copy)` for NUMBER mutations of one file; return the wrong.

    whole: a folder, of which each mutation gets a copy. result(copy): what the command leaves.
    """
    want, copy = None, tmp_path / "copy"
    raw, rng = (whole / file).read_bytes(), random.Random(file)
    outcomes, wrong, begun = Counter(), [], time.time()
    for i in range(-1, NUMBER):
        shutil.copytree(whole, copy)
        change = rng.choice(changes)
        if i >= 0:
            (copy / file).write_bytes(change(rng, raw))
        outcome, line = in_a_child(lambda: command(copy))
        if i < 0:
            assert outcome == "done", line
            want = result(copy)
        elif outcome == "done":
            got = quietly(lambda: result(copy))
            same = got[0] == "done" and not differing(result(copy), want)
            outcome = "exact" if same else "DIFFERENT"
        elif outcome == "refused" and str(copy) not in line:
            outcome = "REFUSED WITHOUT A NAME"
        if i >= 0:
            outcomes[outcome] += 1
            if outcome not in ("refused", "exact"):
                wrong.append(f"{file} {i} {change.__name__}: {outcome} {line}"[:300])
        shutil.rmtree(copy)
    print(f"\n{file}: {dict(outcomes)}, {time.time() - begun:.0f} s")
    return wrong


def check(wrong):
    assert not wrong, "\n".join(["", *wrong])


# --------------------------------------------------------------------------------------------------
# A run that goes on, and its data.

MORE = ["--resume", "--samples=0", "--steps=8"]


@pytest.fixture(scope="module")
def whole(cpu, tmp_path_factory):
    """A folder with a set of data, a run on it, its export, and samples, finished and not."""
    folder = tmp_path_factory.mktemp("whole")
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 1, 8, 8), np.uint8), np.arange(60) % 10
    write_set(folder / "data", images, labels, held_out=8, flip=True)
    train_min.train_and_sample(arguments(folder, "--samples=0"))
    sample_min.main([f"{folder}/run/ckpt.pt", f"--export={folder}/model"])
    sample_min.main(sampling(folder, folder / "run" / "ckpt.pt"))
    with pytest.MonkeyPatch.context() as patch:  # a kill before the last images
        patch.setattr(sample_min, "finish", lambda *_, **__: None)
        sample_min.main(sampling(folder, folder / "run" / "ckpt.pt", "p.npz"))
    return folder


def arguments(folder, *more):
    values = vars(CONFIG) | vars(RUN) | {"data": f"{folder}/data", "out": f"{folder}/run"}
    return [*flags(**values), *more]


def sampling(folder, model, out="s.npz"):
    return [str(model), "--steps=2", "--images=6", "--batch=2", f"--out={folder}/{out}"]


def resume(folder):
    train_min.train_and_sample(arguments(folder, *MORE))


def run_of(folder):
    return {"checkpoint": parts(folder / "run"), "log": without_speed(read_log(folder / "run"))}


def checkpoint_of(folder):
    return parts(folder / "run")


def test_a_run_goes_on_from_a_mutated_checkpoint_exactly_or_not_at_all(whole, tmp_path):
    changes = [*BYTES, *[edited_checkpoint] * 10]
    check(mutate(tmp_path, whole, "run/ckpt.pt", changes, resume, run_of))


def test_a_mutated_log_never_changes_the_run(whole, tmp_path):
    changes = [*BYTES, edited_line, edited_line]
    check(mutate(tmp_path, whole, "run/log.jsonl", changes, resume, checkpoint_of))


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "meta.json"])
def test_a_run_goes_on_with_its_own_data_or_not_at_all(whole, tmp_path, name):
    changes = [*BYTES, *[edited_json] * 8] if name == "meta.json" else BYTES
    check(mutate(tmp_path, whole, f"data/{name}", changes, resume, run_of))


# --------------------------------------------------------------------------------------------------
# Models and samples.


def made(folder, name):
    with np.load(folder / name) as npz:
        return [torch.from_numpy(npz[name]) for name in ("arr_0", "labels")]


def sample(model):
    def command(folder):
        (folder / "s.npz").unlink()
        sample_min.main(sampling(folder, folder / model), load=pretrained.load)

    return command


@pytest.mark.parametrize("model, file", [
    ("run/ckpt.pt", "run/ckpt.pt"),
    ("model", "model/model.safetensors"),
    ("model", "model/config.json"),
])  # fmt: skip
def test_samples_are_those_of_the_whole_model_or_there_are_none(whole, tmp_path, model, file):
    extra = {"ckpt.pt": edited_checkpoint, "config.json": edited_json}.get(Path(file).name, flip)
    changes = [*BYTES, *[extra] * 6]
    images = functools.partial(made, name="s.npz")
    check(mutate(tmp_path, whole, file, changes, sample(model), images))


def finished(folder):
    sample_min.main(sampling(folder, folder / "run" / "ckpt.pt"), load=pretrained.load)


def unfinished(folder):
    command = sampling(folder, folder / "run" / "ckpt.pt", "p.npz")
    sample_min.main(command, load=pretrained.load)


def test_a_mutated_npz_is_not_taken_for_a_finished_one(whole, tmp_path):
    images = functools.partial(made, name="s.npz")
    check(mutate(tmp_path, whole, "s.npz", BYTES, finished, images))


def test_an_unfinished_npz_goes_on_to_the_same_images_or_not_at_all(whole, tmp_path):
    images, wrong = functools.partial(made, name="p.npz"), []
    for name in sorted(p.name for p in (whole / "p.npz.partial").iterdir()):
        changes = [*BYTES, *[edited_json] * 8] if name.endswith(".json") else BYTES
        wrong += mutate(tmp_path, whole, f"p.npz.partial/{name}", changes, unfinished, images)
    check(wrong)
