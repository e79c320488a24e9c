"""The layout of compressed-tensors: weights on a grid as transformers and vLLM read them. Loads no
torch.

Source: the package `compressed-tensors` 0.20: `quantization_config` as its `QuantizationConfig`
serializes it; `pack-quantized` (codes of 4 and 8 bits in words of 32, zero points packed along the
rows) and `int-quantized` (int8); `input_scale` of inputs that are static. Not read: floating-point
types, blocks, activation order, global scales, transforms other than `rotate` of
`deepseek.ops.rotation`, which is its `hadamard` with a `head_dim` of 64: before a linear layer, or
behind an embedding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek.errors import FormatError, describe
from deepseek.hub.safetensors import TensorEntry
from deepseek.hub.stored_grid import StoredGrid, check_part, pack_rows, read_array, unpack_rows
from deepseek.ops.grid import OFFSET, Bytes, Floats, Grid
from deepseek.ops.scheme import ROTATED

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""Of the package whose layout is written."""
_SCALES = ("F16", "BF16", "F32")
_HEAD = "lm_head"
_COMMON_GROUPS = (32, 64, 128)
_INPUT_SCALE = "input_scale"
_INPUTS = {True: "token", False: "tensor"}
"""The strategy of inputs by whether it is dynamic."""


class Settings(NamedTuple):
    """What weights of one entry of `config_groups` have in common."""

    bits: int
    group: int | None
    """Channels of one scale; None for one scale a row."""
    is_symmetric: bool
    is_embedding: bool = False
    is_rotated: bool = False
    has_static_inputs: bool = False

    @property
    def format(self) -> str:
        """The name of the layout of its tensors."""
        return "int-quantized" if self.bits == 8 and self.is_symmetric else "pack-quantized"


@dataclasses.dataclass(frozen=True, eq=False)
class CompressedGrid(StoredGrid):
    """A weight in one of the two layouts: the part `weight_packed` or the part `weight`."""

    def read_codes(self) -> Bytes:
        """Return the codes, uint8 [N, K]."""
        if "weight" in self.parts:
            return self.array("weight").view(np.uint8) ^ np.uint8(OFFSET[8])
        return unpack_rows(self.array("weight_packed"), self.bits, self.shape[1])

    def read_scales(self) -> tuple[Floats, Bytes]:
        """Return the scales, float32 [N, groups], and the zero points, uint8 [N, groups]."""
        shape = self.shape[0], self.groups
        scale = self.finite(self.array("weight_scale"), "weight_scale")
        scale = np.array(np.broadcast_to(scale, shape))
        if "weight_zero_point" not in self.parts:
            return scale, np.full(shape, OFFSET[self.bits], np.uint8)
        zero = self.array("weight_zero_point")
        if "weight" in self.parts:
            return scale, zero.view(np.uint8) ^ np.uint8(OFFSET[8])
        return scale, np.ascontiguousarray(unpack_rows(zero.T, self.bits, shape[0]).T)


def grid_settings(name: str, grid: Grid) -> Settings:
    """Return the settings by which a weight is written.

    Args:
        name: of the weight, by which an embedding is known.
        grid: the weight.
    """
    is_row = grid.group == grid.codes.shape[1] and grid.group not in _COMMON_GROUPS
    return Settings(
        bits=grid.bits,
        group=None if is_row else grid.group,
        is_symmetric=bool((grid.zero == OFFSET[grid.bits]).all()),
        is_embedding=_is_embedding(name),
        is_rotated=grid.is_rotated,
        has_static_inputs=grid.input_scale is not None,
    )


def write_grid(name: str, grid: Grid) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    """Yield the tensors that stand for a weight.

    Args:
        name: of the weight.
        grid: its scales are numbers of float16.
    """
    settings = grid_settings(name, grid)
    if settings.format == "int-quantized":
        yield name, (grid.codes ^ np.uint8(OFFSET[8])).view(np.int8)
    else:
        yield f"{name}_packed", pack_rows(grid.codes, grid.bits)
        yield f"{name}_shape", np.array(grid.codes.shape, np.int64)
        if not settings.is_symmetric:
            zero = pack_rows(np.ascontiguousarray(grid.zero.T), grid.bits)
            yield f"{name}_zero_point", np.ascontiguousarray(zero.T)
    yield f"{name}_scale", grid.scale.astype(np.float16)
    if grid.input_scale is not None:
        yield f"{_module(name)}.{_INPUT_SCALE}", np.array([grid.input_scale], np.float32)


def write_config(
    weights: Mapping[str, Settings], others: list[str], *, has_tied_head: bool = False
) -> dict[str, Any]:
    """Return the `quantization_config` of a model.

    The settings that most linear weights have are said of their class, all others by name. Inputs
    of int8 weights are declared int8 too, symmetric, with a scale for each token unless they have a
    static one.

    Args:
        weights: those on a grid, with their settings.
        others: matrices that are on none.
        has_tied_head: whether the head is the embedding and a linear layer of its own.
    """
    modules: dict[Settings, list[str]] = {}
    for name, settings in weights.items():
        modules.setdefault(settings, []).append(_module(name))
    linear = [settings for settings in modules if not settings.is_embedding]
    usual = max(linear, key=lambda settings: len(modules[settings]), default=None)
    groups = {
        f"group_{number}": _config_group(settings, ["Linear"] if settings == usual else names)
        for number, (settings, names) in enumerate(modules.items())
    }
    formats = {settings.format for settings in modules}
    ignored = [_module(name) for name in others if usual is not None and not _is_embedding(name)]
    return {
        "version": VERSION,
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": _write_transforms(modules, has_tied_head),
    }


def _write_transforms(modules: Mapping[Settings, list[str]], has_tied_head: bool) -> dict[str, Any]:
    """Return the `transform_config`: products rotate their inputs, embeddings their outputs."""
    rotated: dict[bool, list[str]] = {}
    for settings, names in modules.items():
        if settings.is_rotated:
            rotated.setdefault(settings.is_embedding, []).extend(names)
    if has_tied_head and True in rotated:
        rotated.setdefault(False, []).append(_HEAD)
    groups = {}
    for is_embedding, names in rotated.items():
        place = "output" if is_embedding else "input"
        apply = [
            {"targets": names, "location": location, "inverse": is_inverse, "ignore": []}
            for location, is_inverse in (
                (place, is_embedding),
                (f"weight_{place}", not is_embedding),
            )
        ]
        groups[f"rotated_{place}"] = {
            "type": "hadamard",
            "apply": apply,
            "randomize": False,
            "requires_grad": False,
            "head_dim": ROTATED,
            "precision": "torch.float32",
        }
    return {"config_groups": groups} if groups else {}


def _config_group(settings: Settings, targets: list[str]) -> dict[str, Any]:
    has_int8_inputs = settings.has_static_inputs or (
        settings.format == "int-quantized" and not settings.is_embedding
    )
    is_dynamic = not settings.has_static_inputs
    inputs = _args(8, _INPUTS[is_dynamic], None, is_symmetric=True, is_dynamic=is_dynamic)
    strategy = "channel" if settings.group is None else "group"
    return {
        "targets": targets,
        "weights": _args(
            settings.bits, strategy, settings.group, is_symmetric=settings.is_symmetric
        ),
        "input_activations": inputs if has_int8_inputs else None,
        "output_activations": None,
        "format": settings.format,
    }


def _args(
    bits: int, strategy: str, group: int | None, *, is_symmetric: bool, is_dynamic: bool = False
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": is_symmetric,
        "group_size": group,
        "strategy": strategy,
        "dynamic": is_dynamic,
    }


def read_grids(
    folder: Path, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[str, CompressedGrid]:
    """Return the weights on a grid in a folder, by their names there; only headers and shapes are
    read.

    Args:
        folder: the model folder.
        config: the `quantization_config` of its `config.json`.
        entries: what `read_entries` gave.

    Raises:
        FormatError: settings that are not read here, or tensors that do not fit them.
    """
    rotations = _read_transforms(config.get("transform_config"))
    found = {}
    for name in entries:
        module, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and f"{name}_scale" in entries):
            weight = f"{module}.weight"
            entry = _group_of(module, config.get("config_groups"))
            args = _table(entry.get("weights"), module)
            parts = {
                each.rpartition(".")[2]: entries[each]
                for each in (weight, *(f"{weight}_{end}" for end in _ENDS))
                if each in entries
            }
            scale = f"{module}.{_INPUT_SCALE}"
            if scale in entries:
                parts[_INPUT_SCALE] = entries[scale]
            grid = _grid(folder, weight, args, parts)
            is_rotated = any(_meets(module, each) for each in rotations)
            found[weight] = dataclasses.replace(
                grid,
                is_rotated=_checked_rotation(weight, grid, is_rotated),
                input_scale=_input_scale(grid, weight, entry.get("input_activations")),
            )
    return found


_ENDS = ("packed", "scale", "shape", "zero_point", "g_idx", "global_scale")


def _read_transforms(config: object) -> list[list[str]]:
    """Return the targets of each rotation of a `transform_config`."""
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    if config and not isinstance(groups, Mapping):
        raise _refuse("transform_config", "a table of config_groups", config)
    found = []
    for name, scheme in (groups or {}).items():
        whole = scheme if isinstance(scheme, Mapping) else {}
        apply = [each for each in whole.get("apply") or [] if isinstance(each, Mapping)]
        places = {str(each.get("location")) for each in apply}
        targets = [list(map(str, each.get("targets") or [])) for each in apply]
        is_ours = (
            whole.get("type") == "hadamard"
            and whole.get("head_dim") == ROTATED
            and not whole.get("randomize")
            and places in ({"input", "weight_input"}, {"output", "weight_output"})
            and len(apply) == 2
            and targets[0] == targets[1]
            and not any(each.get("ignore") for each in apply)
            and all(_may_rotate(each, places) for each in targets[0])
        )
        if not is_ours:
            must = f"hadamard of {ROTATED} channels before layers or behind embeddings"
            raise _refuse(f"transform {name!r}", must, scheme)
        found.append(targets[0])
    return found


def _may_rotate(target: str, places: set[str]) -> bool:
    """Whether a target is of the kind whose channels lie at these places."""
    return (target == "Embedding" or _is_embedding(target)) == ("output" in places)


def _grid(
    folder: Path, name: str, args: Mapping[str, Any], parts: Mapping[str, TensorEntry]
) -> CompressedGrid:
    bits, strategy = args.get("num_bits"), args.get("strategy")
    if args.get("type", "int") != "int" or bits not in (4, 8):
        raise _refuse(f"weights of {name!r}", "integers of 4 or 8 bits", dict(args))
    if strategy not in ("group", "channel", "tensor"):
        raise _refuse(f"strategy of {name!r}", "group, channel or tensor", strategy)
    for extra in ("weight_g_idx", "weight_global_scale"):
        if extra in parts:
            raise _refuse(f"{extra} of {name!r}", "absent", "there")
    rows, width = _shape(folder, name, bits, parts)
    group = args.get("group_size") if strategy == "group" else width
    if type(group) is not int or group < 1 or width % group:
        raise _refuse(f"group_size of {name!r}", f"a divisor of {width}", group)
    groups, is_packed = width // group, "weight_packed" in parts
    scales = (1,) if strategy == "tensor" else (rows, groups)
    check_part(parts, "weight_scale", _SCALES, scales)
    if not args.get("symmetric", True):
        packed = -(-rows * bits // 32), groups
        shape, dtype = (packed, "I32") if is_packed else ((rows, groups), "I8")
        check_part(parts, "weight_zero_point", (dtype,), shape)
    elif "weight_zero_point" in parts:
        raise _refuse(f"weight_zero_point of {name!r}", "absent: it is symmetric", "there")
    return CompressedGrid(folder, parts, bits, (rows, width), group)


def _checked_rotation(name: str, grid: CompressedGrid, is_rotated: bool) -> bool:
    if is_rotated and (grid.bits != 8 or grid.group % ROTATED):
        must = f"8 bits in groups of a multiple of {ROTATED}, for it is rotated"
        raise _refuse(name, must, f"{grid.bits} bits in groups of {grid.group}")
    return is_rotated


def _input_scale(grid: CompressedGrid, name: str, args: object) -> float | None:
    """Return the scale of inputs that do not bring their own."""
    if not isinstance(args, Mapping) or args.get("dynamic") is not False:
        if _INPUT_SCALE in grid.parts:
            raise _refuse(f"{_INPUT_SCALE} of {name!r}", "absent: its inputs are dynamic", "there")
        return None
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
    if any(args.get(key) != value for key, value in wanted.items()):
        must = "int8, symmetric and of one scale, where they are static"
        raise _refuse(f"inputs of {name!r}", must, dict(args))
    count = grid.parts.get(_INPUT_SCALE)
    shape = () if count is not None and count.shape == () else (1,)
    check_part(grid.parts, _INPUT_SCALE, _SCALES, shape)
    scale = float(grid.finite(grid.array(_INPUT_SCALE), _INPUT_SCALE).reshape(-1)[0])
    if scale <= 0:
        raise _refuse(f"{_INPUT_SCALE} of {name!r}", "above 0", scale)
    return scale


def _shape(folder: Path, name: str, bits: int, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
    packed = parts.get("weight_packed")
    if packed is None:
        given = parts["weight"].shape
        if bits != 8 or len(given) != 2 or "weight_shape" in parts:
            raise _refuse(name, "int8 [rows, channels]", f"{bits} bits {list(given)}")
        check_part(parts, "weight", ("I8",), given)
        return given[0], given[1]
    if "weight" in parts:
        raise _refuse(name, "given once", "packed and not packed")
    check_part(parts, "weight_shape", ("I64", "I32"), (2,))
    rows, width = (int(size) for size in read_array(folder, parts["weight_shape"]).tolist())
    if rows < 1 or not 1 <= width <= packed.num_elements * 32 // bits:
        raise _refuse(f"weight_shape of {name!r}", "that of the packed codes", [rows, width])
    check_part(parts, "weight_packed", ("I32",), (rows, -(-width * bits // 32)))
    return rows, width


def _group_of(module: str, groups: object) -> Mapping[str, Any]:
    """Return the config group of a module: that of its name, of a pattern, of its class."""
    if not isinstance(groups, Mapping) or not groups:
        raise _refuse("config_groups", "a table", groups)
    of_class: object = None
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise _refuse("config group", "a table with targets", group)
        targets = list(map(str, group["targets"]))
        if any(_names(module, target) for target in targets):
            return group
        if _class_of(module) in targets:
            of_class = group
    return _table(of_class, module)


def _meets(module: str, targets: list[str]) -> bool:
    return _class_of(module) in targets or any(_names(module, target) for target in targets)


def _names(module: str, target: str) -> bool:
    """Whether a target is a module's name or a pattern of it."""
    return target == module or (target.startswith("re:") and _matches(target[3:], module))


def _class_of(module: str) -> str:
    return "Embedding" if _is_embedding(module) else "Linear"


def _table(settings: object, module: str) -> Mapping[str, Any]:
    if not isinstance(settings, Mapping):
        raise _refuse(f"settings of {module!r}", "in a config group", settings)
    return settings


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise _refuse("target", "a regular expression", f"{pattern!r} ({error})") from error


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _is_embedding(name: str) -> bool:
    return "embed" in _module(name).rpartition(".")[2]


def _refuse(name: str, must: str, got: object) -> FormatError:
    return FormatError(describe(name, "quantization_config", must, got))
