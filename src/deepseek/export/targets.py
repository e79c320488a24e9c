"""Back ends that no machine of ours has: what each takes, by its maker's documents, and which of
our formats goes there. Whoever has one adds a `Format` of their own, and proves it by
`deepseek.testing.check_exporter`. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """A back end, as its maker describes it."""

    name: str
    takes: str
    """Of `FORMATS`, what its compiler reads; `bundle` for the model's own folder."""
    types: tuple[str, ...]
    """Types of numbers it computes with."""
    compiler: str
    """What makes its program of our files."""
    limits: str
    """What of our files it may not take."""
    source: str
    """Address of the document that this is from."""


_OPSET = "ours is 21; onnx.version_converter makes it 18 with the same numbers, and no less"
LOWEST_OPSET = 18
"""To which `onnx.version_converter` lowers our graphs; a test holds it."""
TARGETS = (
    Target(
        name="AMD ROCm (MIGraphX)",
        takes="onnx",
        types=("float32", "float16", "int8", "fp8 (E4M3FNUZ)"),
        compiler="migraphx-driver compile model.onnx",
        limits=f"documented to opset 19 (ROCm 7.2); {_OPSET}",
        source="https://rocm.docs.amd.com/projects/AMDMIGraphX/en/docs-7.2.2/dev/onnx_operators.html",
    ),
    Target(
        name="Huawei Ascend (CANN)",
        takes="onnx",
        types=("float32", "float16", "int8"),
        compiler="atc --framework=5 --model=model.onnx --output=model --soc_version=NAME",
        limits=f"documented for ONNX 1.12 (opset 17), by operator; {_OPSET}",
        source="https://www.hiascend.com/document/detail/en/CANNCommunityEdition/900/API/aolapi/operatorlist_00176.html",
    ),
    Target(
        name="Cambricon MLU (MagicMind)",
        takes="onnx",
        types=("float32", "float16", "int8"),
        compiler="MagicMind's parser of ONNX and its builder",
        limits="operators and opset stand in a document that is not public: ask the maker",
        source="https://gitee.com/cambricon/magicmind_cloud",
    ),
    Target(
        name="Rockchip RK3588 (RKNN)",
        takes="onnx",
        types=("float16", "int8"),
        compiler="rknn.api.RKNN().load_onnx, build, export_rknn",
        limits=f"documented for opset 12 to 19 (toolkit 1.6), sizes fixed or few; {_OPSET}",
        source="https://github.com/rockchip-linux/rknn-toolkit2/releases",
    ),
    Target(
        name="Sophgo TPU (TPU-MLIR)",
        takes="onnx",
        types=("float32", "float16", "bfloat16", "int8"),
        compiler="model_transform.py, then model_deploy.py",
        limits="opset not documented; sizes are given when it is compiled",
        source="https://github.com/sophgo/tpu-mlir",
    ),
    Target(
        name="Qualcomm Hexagon (QNN)",
        takes="onnx",
        types=("float16", "int8"),
        compiler="qairt-converter --input_network model.onnx",
        limits="documented to opset 24, by operator; fixed sizes on the NPU",
        source="https://docs.qualcomm.com/bundle/publicresource/80-63442-10/topics/supported_onnx_ops.md",
    ),
    Target(
        name="NVIDIA GPU (TensorRT)",
        takes="tensorrt",
        types=("float32", "float16", "bfloat16"),
        compiler="build.sh of the plan, by trtexec",
        limits="documented to opset 25 (TensorRT 11); types come from the graph alone",
        source="https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html",
    ),
)
"""In no order of merit; nothing here was run by us."""
