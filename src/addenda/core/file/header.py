"""What is in an adapter file, checked for form but not against any model. `core.file.save` says what it means."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from addenda.core.base.errors import AddendaError, nearest
from addenda.core.base.visible import label
from addenda.core.disk.access import path_of, reading, shown
from addenda.core.disk.atomic import write_atomically
from addenda.core.packed.few_bits import FewBits, code_bytes

SCHEMA = 1
_MAX_HEADER = 64 << 20
PEFT = "adapter_config.json"  # the file by which PEFT knows its folders
FROM_PEFT = (
    "which addenda does not import yet. Merge it there (`PeftModel.from_pretrained(base, folder).merge_and_unload()`, "
    "then save_pretrained) and give the merged folder as the model; or train the method here."
)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def write(path: Path, header: dict, tensors: dict[str, Tensor]) -> Path:
    """A file of what `read` gives."""
    sites = [{k: v for k, v in s.items() if v or k != "packed"} for s in header["sites"]]
    header = {k: v for k, v in header.items() if v or k not in ("head", "labels")} | {"sites": sites}
    # one entry only: safetensors writes several in random order, and equal adapters should be equal files
    write_atomically(path, to_bytes(tensors, {"addenda": json.dumps(header)}))
    return path


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The header and the tensors of a file, checked for form but not against any model.

    Raises AddendaError for a file that is missing, damaged, of another make or of a newer schema.
    """
    path = path_of(path)
    with reading(path):
        folder, there = path.is_dir(), path.is_file()
    if of_peft(path):
        raise AddendaError(f"{shown(path)} is an adapter of PEFT, {FROM_PEFT}")
    if folder:
        inside = sorted(p.name for p in path.glob("*.safetensors"))[:4]
        raise AddendaError(f"{path} is a folder, and an adapter is a file. In it: {', '.join(inside) or 'none'}.")
    if not there:
        raise AddendaError(f"There is no file {shown(path)}.{_hint(path)}")
    try:
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
        if size > min(_MAX_HEADER, path.stat().st_size):
            raise AddendaError(f"{path} claims a header of {size:,} bytes, which is more than there can be.")
        with safe_open(path, framework="pt") as f:
            text = (f.metadata() or {}).get("addenda")
            if text is None:
                if any(key.startswith("base_model.model.") for key in f.keys()):  # noqa: SIM118
                    raise AddendaError(f"{shown(path)} is an adapter of PEFT, {FROM_PEFT}")
                raise AddendaError(
                    f"{path} is a safetensors file, but not an adapter of addenda (no 'addenda' header)."
                )
            # copies begin where torch's own tensors do, so that sums are taken in the same order
            tensors = {key: f.get_tensor(key).clone() for key in f.keys()}  # noqa: SIM118
        header = json.loads(text)
        _check_form(header, tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = label(error, 600)  # the names in it are the file's own
        raise AddendaError(f"{path} is damaged or no adapter file: {type(error).__name__}: {why}.") from None
    return header, tensors


def of_peft(path: Path) -> bool:
    """Whether a folder is an adapter of PEFT, or a file the weights of one. False where it cannot be looked at."""
    try:
        weights = path.name in ("adapter_model.safetensors", "adapter_model.bin", PEFT)
        folder = path.parent if weights and not path.is_dir() else path
        return (folder / PEFT).is_file()
    except OSError:
        return False


def _hint(path: Path) -> str:
    around = [p.name for p in path.parent.glob("*.safetensors")] if path.parent.is_dir() else []
    return nearest(path.name, around) or (f" In that folder: {', '.join(around[:8])}." if around else "")


def _check_form(header: dict, tensors: dict[str, Tensor]) -> None:
    """Everything `load` will rely on; ValueError says what is wrong."""
    schema = header["schema"]
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise ValueError(f"schema {schema!r}, this version of addenda reads up to {SCHEMA}; upgrade it")
    if not (isinstance(header["seed"], int) and isinstance(header["step"], int) and header["step"] >= 0):
        raise ValueError("seed and step must be whole numbers")
    if not (isinstance(header["methods"], list) and isinstance(header["sites"], list)):
        raise ValueError("methods and sites must be lists")
    for m in header["methods"]:
        if not isinstance(m["name"], str) or not isinstance(m["options"], dict):
            raise ValueError("a method needs a name and options")
    named: set[str] = set()
    for s in header["sites"]:
        if not (isinstance(s["path"], str) and isinstance(s["kind"], str) and isinstance(s["checks"], dict)):
            raise ValueError("a site needs a path and a kind")
        names = [*s["trainable"], *s["frozen"]]
        if not (all(isinstance(k, str) for k in names) and len(set(names)) == len(names)):
            raise ValueError(f"{s['path']}: names of tensors must be text, each once")
        if not all(isinstance(c, str) or _numbers(c, 2) for c in s["checks"].values()):
            raise ValueError(f"{s['path']}: a checksum must be a hash or two numbers")
        if s["method"] != -1 and not (isinstance(s["hash"], str) and _numbers(s["sample"])):
            raise ValueError(f"{s['path']}: the base's hash and sample must be there")
        if not (isinstance(s["dtype"], str) and _sizes(s["shape"])):
            raise ValueError(f"{s['path']}: dtype and shape must be there")
        if not (isinstance(s["method"], int) and -1 <= s["method"] < len(header["methods"])):
            raise ValueError(f"{s['path']}: method {s['method']!r} is not listed")
        keys = [*s["trainable"], *s["frozen"], *(s["checks"] if header["basis"] else ())]
        keys += [f"{k}.moments" for k in s.setdefault("packed", {})]
        named.update(f"{s['path']}/{k}" for k in keys)
    if not isinstance(header.setdefault("head", {}), dict):
        raise ValueError("the options of heads must be by name")
    labels = header.setdefault("labels", [])
    if not (isinstance(labels, list) and all(isinstance(n, str) and n for n in labels)):
        raise ValueError("labels must be a list of names")
    if len(set(labels)) < len(labels):
        raise ValueError("labels must be different names, one for each output")
    pools = header.setdefault("pools", [])
    for i, names in enumerate(pools):
        keys = [f".{i}/{k}" for k in names]
        once = len({*named, *keys}) == len(named) + len(keys)
        if not (isinstance(names, list) and all(isinstance(k, str) for k in names) and once):
            raise ValueError("the tensors of a pool must have names of their own")
        named.update(keys)
    if len({s["path"] for s in header["sites"]}) < len(header["sites"]) or not header["sites"]:
        raise ValueError("sites must be there, each once")
    if named != set(tensors):
        missing, more = sorted(named - set(tensors)), sorted(set(tensors) - named)
        raise ValueError(f"tensors and header disagree (missing {missing[:4]}, unexpected {more[:4]})")
    for s in header["sites"]:
        for key, shape in s["packed"].items():
            if key not in s["trainable"]:
                raise ValueError(f"{s['path']}: packed {key!r} is not among the trained tensors")
            _check_codes(f"{s['path']}/{key}", shape, bits_of(header, s), tensors)
    for s in header["sites"]:  # whoever makes a head of this size must find as many numbers
        claimed, held = math.prod(s["shape"]), sum(count_of(s, k, tensors) for k in s["trainable"])
        if s["method"] == -1 and claimed != held:
            raise ValueError(f"{s['path']} is said to be {s['shape']}, {claimed:,} numbers, and {held:,} are there")
    trained = [tensors[f"{s['path']}/{k}"] for s in header["sites"] for k in s["trainable"] if k not in s["packed"]]
    trained += [tensors[f".{i}/{k}"] for i, names in enumerate(pools) for k in names]
    if not all(t.dtype in FLOATING for t in trained):
        raise ValueError("trained tensors must be float64, float32, bfloat16 or float16")


def bits_of(header: dict, site: dict) -> int | None:
    """The bits of a site's matrices."""
    options = header["head"] if site["method"] == -1 else header["methods"][site["method"]]["options"]
    return options.get("bits")


def _check_codes(key: str, shape: object, bits: object, tensors: dict[str, Tensor]) -> None:
    """Whether codes and moments are those of a matrix of this shape, or of a stack of them."""
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"{key} is packed, and its bits must be from 1 to 8, got {bits!r}")
    if not (isinstance(shape, list) and shape and _sizes(shape)):
        raise ValueError(f"{key} is packed, and its shape must be whole numbers above 0")
    codes, moments, stack = tensors[key], tensors[f"{key}.moments"], tensors[key].dim() == 2
    lead = shape[:1] if stack else []
    want = [*lead, code_bytes(math.prod(shape[len(lead) :]), bits)]
    if codes.dtype != torch.uint8 or list(codes.shape) != want:
        raise ValueError(f"{key} must be {want} bytes of codes for {shape} in {bits} bits, got {list(codes.shape)}")
    if moments.dtype != torch.float32 or list(moments.shape) != [*lead, 2]:
        raise ValueError(f"{key}.moments must be {[*lead, 2]} float32 numbers")
    if not bool(torch.isfinite(moments).all()) or bool((moments[..., 1] < 0).any()):
        raise ValueError(f"{key}.moments must be finite, and the deviation at least 0")


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 < n < 2**40 for n in value)


def _numbers(value: object, count: int | None = None) -> bool:
    if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
        return False
    return count in (None, len(value))


def packed_as(key: str, packed: FewBits) -> dict[str, Tensor]:
    """The two tensors that a file holds of a matrix in few bits."""
    return {key: packed.codes.cpu().contiguous(), f"{key}.moments": packed.moments.cpu().contiguous()}


def count_of(entry: dict, key: str, tensors: dict[str, Tensor]) -> int:
    """How many numbers a trained tensor of a site is, in codes or not."""
    packed = entry["packed"].get(key)
    return tensors[f"{entry['path']}/{key}"].numel() if packed is None else math.prod(packed)
