"""Reads the file or folder of a model, whoever wrote it, and checks it before anything is built.

For sample_min.py and experiments/pretrained.py. Imports dydilit.py, torch and safetensors.

    load(path)             a model ready for sampling, as DyDiLiT.from_pretrained gives it
    read(path)             what the file says: "ema" (the weights), and kind, config, meta, step if
                           it has them
    check_weights(...)     the sizes of weights against those of a config, before it is built
"""

import argparse
import json
import re
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import dydilit
from dydilit import DWC, Config, DyDiLiT, load_checkpoint, naming, read_folder

# Where others keep weights. Averaged ones first.
PLACES = ("ema", "ema_state_dict", "model_ema", "state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
BEGINNINGS = {  # of files that are taken for a checkpoint by mistake
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` gets the file",
    b"\x93NUMPY": "an array of NumPy",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"\x1f\x8b": "compressed by gzip",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"<": "a web page (of a download that failed?)",
    b"{": "a JSON text",
    b"#": "a text",
}


def load(path: str | Path, kinds: tuple[type, ...] = (Config,)) -> DyDiLiT:
    """DyDiLiT.from_pretrained, for more kinds of files, after every check.

    FileNotFoundError or ValueError, one line, that names the path and what is wrong or what the
    file is instead.
    """
    return build(path, read(path), kinds)


def build(path, saved: dict, kinds=(Config,)) -> DyDiLiT:
    """The model of what `read` returned."""
    if "config" not in saved:
        raise ValueError(f"{path} holds {describe(saved['ema'])}, but not the config of a model")
    known = {kind.__name__: kind for kind in kinds}
    kind, weights = saved.get("kind", "Config"), saved["ema"]
    meta, step = saved.get("meta", {}), saved.get("step")
    if not isinstance(meta, dict) or type(step) not in (int, type(None)):
        raise ValueError(f"{path}: meta must be an object and step a number, got {short(meta)} and "
                         f"{short(step)}")
    with naming(path, "holds no model of this version"):
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"kind {kind!r}, others by experiments/pretrained.py")
        config = known[kind](**saved["config"])
        ours = "optimizer" in saved and "training" in saved  # others may have rounded
        check_weights(weights, config, same_type=ours)
        model = config.build()
        for name, module in model.named_modules():
            if isinstance(module, DWC) and f"{name}.horizontal" not in weights:
                module.horizontal = module.vertical = None  # as merge_ leaves them
        model.load_state_dict(weights)
    numbers = [str(i) for i in range(config.num_classes)]
    model.meta = {"classes": numbers} | meta  # a model that was not trained here has no names
    model.step = step
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Reading.


def read(path: str | Path) -> dict:
    """What a file or folder says of a model, its bytes checked: "ema" and what else it has."""
    path = Path(path)
    if path.is_dir():
        return read_export(path)
    if path.exists() and is_safetensors(path):
        return read_safetensors(path)
    return weights_and_more(path, read_torch(path))


def read_torch(path: Path):
    """What torch.save wrote. Only plain data is read: a pickle may run code."""
    what = other_than_torch(path) if path.exists() else None
    if what:
        raise ValueError(f"{path} is not a readable checkpoint: it is {what}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # beside DiT's own checkpoints
            if path.exists() and path.read_bytes()[:1] == b"\x80":  # before torch 1.6: no zip file
                with naming(path, "is not a readable checkpoint (cut short?)"):
                    return torch.load(path, map_location="cpu", weights_only=True)
            return load_checkpoint(path, mmap=mappable(path))
    except ValueError as e:
        pickled = re.search(r"GLOBAL ([\w.]+)", str(e.__cause__))
        if not pickled:
            raise
        raise ValueError(
            f"{path} holds a pickled {pickled[1]}, and reading that could run code: only tensors, "
            "numbers, texts, lists and dicts are read. Save model.state_dict() and the config, or "
            "model.save_pretrained(folder)"
        ) from e


def mappable(path) -> bool:
    """Whether torch can map the file into memory: only if its name is valid text."""
    try:
        str(path).encode()
        return True
    except UnicodeEncodeError:
        return False


def other_than_torch(path: Path) -> str | None:
    """What a file is by its first bytes, if it is none of torch.save."""
    if path.stat().st_size == 0:
        return "empty"
    with open(path, "rb") as file:
        head = file.read(64)
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    if head.startswith(b"PK\3\4"):
        try:
            with zipfile.ZipFile(path) as file:
                names = file.namelist()
        except Exception:  # of a damaged file: load_checkpoint says so
            return None
        if any(name.endswith(".npy") for name in names):
            return "an .npz of arrays"
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript program"
    return None


def weights_and_more(path: Path, tree) -> dict:
    """The weights in what torch.save wrote, as "ema", beside the other entries."""
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not the weights of a model")
    averaged = tree.get("ema") is not None or {"kind", "training"} <= tree.keys()
    for place in PLACES[:1] if averaged else PLACES:  # never a checkpoint's plain weights instead
        if is_weights(tree.get(place)):
            return tree | {"ema": without_prefixes(tree[place])}
    if is_weights(tree):
        return {"ema": without_prefixes(tree)}
    if averaged:
        raise ValueError(f"{path}: ema must be weights, got {short(tree.get('ema'))}")
    names = ", ".join(map(str, list(tree)[:5]))
    raise ValueError(f"{path} holds no weights; its entries are: {names or 'none'}")


def is_weights(state) -> bool:
    """Whether it is a state dict: texts to tensors (and what torch.compile or averaging add)."""
    return (
        isinstance(state, dict)
        and len(state) > 0
        and all(isinstance(name, str) for name in state)
        and all(isinstance(z, torch.Tensor) for z in state.values())
    )


def without_prefixes(state: dict) -> dict:
    """The state dict of the model inside DistributedDataParallel, torch.compile, AveragedModel."""
    state = {name: z for name, z in state.items() if name != "n_averaged"}
    for prefix in PREFIXES * 2:
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: z for name, z in state.items()}
    return state


# --------------------------------------------------------------------------------------------------
# Exports.


def is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size


def read_safetensors(path: Path) -> dict:
    """A model.safetensors of save_pretrained, by itself, or any other file of safetensors."""
    if (path.parent / "config.json").exists() and path.name == "model.safetensors":
        return read_export(path.parent)
    with naming(path, "is not a readable model.safetensors (cut short?)"):
        weights, about = parse(path.read_bytes())
    return about | {"ema": without_prefixes(weights)}


def read_export(folder: Path) -> dict:
    """What save_pretrained wrote. config.json must be the copy of what model.safetensors says of
    itself, or of another export: a kill may leave the older one."""
    with naming(folder, "holds no model.safetensors and config.json of save_pretrained"):
        saved = read_folder(folder)
        weights, about = parse((folder / "model.safetensors").read_bytes())
        copy = json.loads((folder / "config.json").read_text())
        if about and about["crc32"] == copy.get("crc32") and about != copy:
            here, there = copy | copy["config"], about | about["config"]
            differing = {name: here[name] for name in here if here[name] != there.get(name)}
            raise ValueError(f"config.json has changed: {differing or 'an entry is missing'}")
    return saved | {"ema": without_prefixes(weights)}


def parse(blob: bytes) -> tuple[dict, dict]:
    """The weights in the bytes of a file of safetensors, and what save_pretrained wrote of them,
    {} if it is another's. ValueError if the checksum is not theirs."""
    from safetensors.torch import load

    start = 8 + int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8:start]).get("__metadata__") or {}
    about = json.loads(metadata.get("about", "{}"))
    if about and about["crc32"] != zlib.crc32(memoryview(blob)[start:]):
        raise ValueError("the weights have changed since they were written (checksum)")
    return load(blob), about


# --------------------------------------------------------------------------------------------------
# Comparing.


def check_weights(weights: dict, config: Config, same_type: bool = False):
    """ValueError for the first weight that the model of `config` does not have, or has in another
    shape. Nothing large is made; a merged convolution (DWC.merge_) is a model's, too."""
    check_sizes(weights, config)
    expected = on_meta(config).state_dict()
    branches = [name for name in expected if name.endswith(("dwc.horizontal", "dwc.vertical"))]
    if not any(name in weights for name in branches):  # merged
        expected = {name: z for name, z in expected.items() if name not in branches}
    check_tensors(weights, expected, same_type)


class WithoutNormal(TorchFunctionMode):
    """nn.init.normal_ does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.init.normal_:
            return (args or (kwargs["tensor"],))[0]
        return func(*args, **(kwargs or {}))


def on_meta(config: Config) -> DyDiLiT:
    """The model of `config` with shapes and without values, in milliseconds.

    Its positions are not computed and nothing is drawn from a normal distribution: for either
    torch would import its compiler on the meta device, which takes seconds.
    """
    positions = dydilit.position_embedding
    dydilit.position_embedding = lambda grid, dim: torch.empty(grid[0] * grid[1], dim)
    try:
        with torch.device("meta"), WithoutNormal():
            return config.build()
    finally:
        dydilit.position_embedding = positions


def check_sizes(weights: dict, config: Config):
    """ValueError if numbers of the config cannot be those of the weights. The time and memory that
    building takes grow with them."""
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if config.depth != blocks:
        raise ValueError(f"its config has depth {config.depth}, its weights {blocks} blocks")
    largest = max((max(z.shape, default=0) for z in weights.values()), default=0)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int and value > largest:
            raise ValueError(f"its config has {field.name} {value}, but no side of a weight is "
                             f"longer than {largest}")


def check_tensors(found: dict, expected: dict, same_type: bool = True):
    """ValueError for the first entry of `found` that differs from `expected` in kind or shape.

    same_type: in dtype as well, and in the order of its elements in memory; without it another
    floating dtype will do.
    """
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in expected:
            raise ValueError(f"{name} is none of its model's")
        if name not in found:
            raise ValueError(f"{name} is missing")
        here, there = layout(found[name], same_type), layout(expected[name], same_type)
        if getattr(found[name], "is_meta", False):
            raise ValueError(f"{name} has no values (it is on the meta device)")
        if here != there:
            raise ValueError(f"{name} is {here}, but its model has {there}")


def layout(z, exact: bool) -> str:
    """Type, shape and, where the elements do not lie in the order of the axes, strides."""
    if not isinstance(z, torch.Tensor):
        return f"{type(z).__name__} {short(z)}"
    if z.layout != torch.strided:
        return f"of the layout {z.layout}"
    kind = str(z.dtype).removeprefix("torch.")
    if not exact:
        return f"{'float' if z.is_floating_point() else kind} {tuple(z.shape)}"
    strides = tuple(step for step, n in zip(z.stride(), z.shape) if n > 1)
    return f"{kind} {tuple(z.shape)}{'' if z.is_contiguous() else f' with strides {strides}'}"


def short(value) -> str:
    """At most 60 characters of it, in one line; a tensor shows itself in several."""
    return " ".join(repr(value).split())[:60]


def describe(weights: dict) -> str:
    """In a few words, what weights without a config are."""
    number = f"{len(weights)} tensors"
    if "x_embedder.proj.weight" in weights and "final_layer.linear.weight" in weights:
        width = len(weights["x_embedder.proj.weight"])
        blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        if any(name.endswith("attn.q_projectors") for name in weights):
            return f"the weights of a DyDiLiT of width {width} and {blocks} blocks, {number}"
        return (f"the weights of a DiT or its like, of width {width} and {blocks} blocks "
                "(experiments/sample.py loads facebookresearch/DiT's), " + number)
    return f"the weights of another model, {number}, {min(weights, default='none')} among them"
