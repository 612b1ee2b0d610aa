"""Loads a ``.pt2`` program of an export without unpickling, and without executing text from the file.

``torch.export.load`` must not read a file of somebody else: it unpickles members of the archive, looks up any name
below ``torch`` as an operator, evaluates the text of symbolic sizes, imports modules that a tree specification names,
and generates Python code in which names from the file occur. So the archive is inspected first, with the reader that
loads it, and refused where it holds anything but what ``torch.export.save`` writes for a model of tensor operators. See
``export/pt2_archive/_package.py``, ``_export/serde/serialize.py`` and ``utils/_pytree.py`` of torch 2.13.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranker.errors import UserError
from ranker.runs.table_files import mapped

_MODEL = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PICKLED = "data/weights/model.pt"
# Raw bytes of tensors, what describes them, and files that hold one word. torch 2.8 pickles weights into model.pt.
_MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id|\d+)|models/model\.json"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+|model\.pt)"
    r"|data/sample_inputs/model\.pt"
)
_NAME = re.compile(r"[\w.]*")  # no quotes, brackets or line breaks, because names occur in generated code
_TEXT = re.compile(r"[\w .,:>+\-]*")  # a string argument of an operator, such as "none" or "ij,jk->ik"
_SIZE = re.compile(  # the tokens of a symbolic size, as torch prints it; sympy evaluates it with Python's eval
    r"Symbol\('[a-z]+\d+'|\b(?:Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv"
    r"|floor|ceiling|Abs|Eq|Ne|Equality|Unequality|Lt|Le|Gt|Ge|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan"
    r"|And|Or|Not|true|false|True|False|integer|positive|nonnegative|[suz]\d+|\d+(?:\.\d+)?)\b|[ (),=<>+*/-]"
)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
# Operators of the library's own use that start with "_" are not meant for callers and may trust their arguments.
_INTERNAL = (
    *("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "_to_copy", "_softmax", "_log_softmax"),
    *("_unsafe_view", "_embedding_bag", "_embedding_bag_forward_only"),
)
# Words that an operator takes as text. Any other text argument, such as the filename of from_file, is refused.
_WORDS = {"rounding_mode", "approximate", "reduce", "equation", "mode", "indexing", "side", "assert_msg", "msg"}
_DESCRIPTIONS = {"stack_trace", "nn_module_stack", "torch_fn"}  # of a node; kept as text
_TREES = {"builtins.dict", "builtins.list", "builtins.tuple", None}


class _RefusedError(Exception):
    """The archive holds something that is not loaded. The message says what."""


def load_program(path: Path) -> nn.Module:
    """Loads a program that ``torch.export.save`` wrote, after its archive was inspected.

    Args:
        path: the ``.pt2`` file.

    Raises:
        UserError: the archive holds something that is not loaded. Nothing was executed.
        Exception: whatever torch raises for a file that is damaged.
    """
    package, _ = _inspected(path)
    # Not torch.export.load: where this fails, it tries a format of older versions, which was not inspected.
    program = package.load_pt2(str(path)).exported_programs["model"]
    unchecked = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    return program.module(**unchecked)  # guards are generated code; the signature has checked the inputs


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights and buffers of a program, without the program. Its archive is inspected all the same.

    Args:
        path: the ``.pt2`` file.

    Returns:
        As ``load_program(path).state_dict()``, in memory that is read when it is used. A program of torch 2.8 is read
        at once.

    Raises:
        UserError: the archive holds something that is not loaded.
        Exception: whatever zipfile and torch raise for a file that is damaged.
    """
    package, reader = _inspected(path)
    if _PICKLED in reader.get_file_names():
        return dict(torch.load(io.BytesIO(reader.read_bytes(_PICKLED)), map_location="cpu", weights_only=True))
    found, flat = {}, dict[str, Tensor]()
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        for name, payload in _object(reader, _CONFIGS[0])["config"].items():
            entry, meta = payload["path_name"], payload["tensor_meta"]
            if entry not in flat:  # tied weights share one
                values = mapped(path, archive, f"{root}/data/weights/{entry}")
                dtype = package.deserialize_scalar_type(meta["dtype"])
                placed = values.data_ptr() % dtype.itemsize == 0  # torch places them so, other writers may not
                flat[entry] = (values if placed else values.clone()).view(dtype)
            sizes, strides = ([number["as_int"] for number in meta[key]] for key in ("sizes", "strides"))
            found[name] = flat[entry].as_strided(sizes, strides, meta["storage_offset"]["as_int"])
    return found


def _inspected(path: Path) -> tuple[Any, Any]:
    """Torch's module for archives, and a reader of this one.

    Raises:
        UserError: the archive holds something that is not loaded.
    """
    try:
        from torch.export.pt2_archive import _package
    except ImportError as error:
        raise UserError(f"{path}: reading a pt2 program safely needs torch 2.8 or later; use the onnx one") from error
    try:
        reader = _package.PT2ArchiveReader(str(path))
        _inspect(reader)
    except _RefusedError as error:
        raise UserError(f"{path} is refused: {error}; nothing of it was loaded (see SECURITY.md)") from error
    return _package, reader


def _inspect(reader: Any) -> None:
    """Refuses an archive with members, payloads or a graph that are not plain."""
    members = reader.get_file_names()
    for member in members:
        if not _MEMBERS.fullmatch(member):
            raise _RefusedError(f"it holds the member {member[:80]!r}, which is not part of a program of tensors")
        if member.endswith(".pt"):
            _check_tensors(member, reader.read_bytes(member))
    for config in _CONFIGS:
        if config in members:
            for name, payload in _object(reader, config)["config"].items():
                if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                    raise _RefusedError(f"the value {name[:80]!r} is pickled")
    _check_tree(_object(reader, _MODEL), "")


def _check_tensors(member: str, content: bytes) -> None:
    """Refuses a pickle that is more than tensors and containers: torch would load it with all objects."""
    try:
        if content:
            torch.load(io.BytesIO(content), weights_only=True, map_location="meta")
    except Exception as error:
        raise _RefusedError(f"{member} is a pickle with objects that are not tensors") from error


def _object(reader: Any, member: str) -> dict[str, Any]:
    found = json.loads(reader.read_string(member))
    if not isinstance(found, dict):
        raise _RefusedError(f"{member} is no JSON object")
    return found


def _check_tree(node: Any, key: str) -> None:
    """Checks every string below a node of the program's JSON by the key that it stands under."""
    if isinstance(node, dict):
        if key == "metadata":
            _check_descriptions(node)
            return
        for name, value in node.items():
            if key == "range_constraints":
                _check_size(name)
            elif not _NAME.fullmatch(name):
                raise _RefusedError(f"{name[:80]!r} is no name")
            _check_tree(value, name)
    elif isinstance(node, list):
        for value in node:
            _check_tree(value, key)
    elif isinstance(node, str):
        _check_text(node, key)


def _check_text(text: str, key: str) -> None:
    if key in ("target", "as_operator"):
        _check_operator(text)
    elif key == "expr_str":
        _check_size(text)
    elif key in ("in_spec", "out_spec"):
        _check_container(text)
    elif key == "guards_code":  # not used: torch makes guards anew, and they are switched off
        return
    elif key in ("as_string", "as_strings", "torch_version"):
        if not _TEXT.fullmatch(text):
            raise _RefusedError(f"the text {text[:80]!r} has characters that no argument needs")
    elif not _NAME.fullmatch(text):
        raise _RefusedError(f"{text[:80]!r} is no name")


def _check_descriptions(metadata: dict[str, Any]) -> None:
    for name, value in metadata.items():
        if name not in _DESCRIPTIONS or not isinstance(value, str):
            raise _RefusedError(f"a node has the metadata {name[:80]!r}")


def _check_size(text: str) -> None:
    if _SIZE.sub("", text):
        raise _RefusedError(f"the size {text[:80]!r} is no arithmetic expression")


def _check_operator(target: str) -> None:
    if _ARITHMETIC.fullmatch(target):
        return
    found = _OPERATOR.fullmatch(target)
    if found is None or (found[1].startswith("_") and found[1] not in _INTERNAL):
        raise _RefusedError(f"the graph calls {target[:80]!r}")
    try:
        schema = getattr(getattr(torch.ops.aten, found[1]), found[2])._schema
    except AttributeError as error:
        raise _RefusedError(f"the graph calls {target[:80]!r}, which this version of torch does not have") from error
    texts = {argument.name for argument in schema.arguments if "str" in str(argument.type)}
    if texts - _WORDS:
        raise _RefusedError(f"the graph calls {target[:80]!r} with a {' and '.join(sorted(texts - _WORDS))}")


def _check_container(text: str) -> None:
    """Refuses a tree of inputs or outputs with types other than dict, list and tuple, or with anything but names."""
    found = json.loads(text)
    if not (isinstance(found, list) and len(found) == 2 and found[0] == 1):
        raise _RefusedError("the inputs are described in an unknown form")
    open_specs = [found[1]]
    while open_specs:
        spec = open_specs.pop()
        context = json.loads(spec["context"]) if isinstance(spec["context"], str) else spec["context"]
        plain = context is None or (isinstance(context, list) and all(isinstance(name, str) for name in context))
        if spec["type"] not in _TREES or not plain:
            raise _RefusedError(f"the inputs or outputs hold a {str(spec['type'])[:80]!r}")
        open_specs += spec["children_spec"]
