"""Runs an exported ONNX model by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import numpy as np

from deepseek.errors import ConfigError, FormatError, ShapeError, describe, missing_extra
from deepseek.export.formats import Floats, Ids, Kind
from deepseek.export.onnx.decoder import LAST
from deepseek.export.onnx.graph import MODEL

if TYPE_CHECKING:
    import onnxruntime

_LAYER = "layers."
_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxReader:
    """An exported model in a session of ONNX Runtime. Is a `Reader`.

    Args:
        folder: what `export` wrote, or the `.onnx` file.
        threads: to compute with; None for all cores.

    Raises:
        FormatError: the file is no model that we wrote, or is damaged.
        MissingExtra: onnxruntime is not installed.
    """

    max_batch = 1024

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_extra("onnxruntime", "export", "to run ONNX files") from error
        self._runtime = onnxruntime
        self._path = folder / MODEL if folder.is_dir() else folder
        self._threads = threads
        self._is_exact = False
        self._session = self._open(str(self._path))
        about = self._session.get_modelmeta().custom_metadata_map
        kind = about.get("kind")
        if kind not in get_args(Kind) or not about.get("max_tokens", "").isdigit():
            must = "a model that deepseek exported"
            raise FormatError(describe("metadata", str(self._path), must, about))
        if about.get("activations") == "float32":
            self._is_exact = True
            self._session = self._open(str(self._path))
        self._layers: onnxruntime.InferenceSession | None = None
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.kind = cast("Kind", kind)
        self.max_tokens = int(about["max_tokens"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._past = {
            each.name: each.shape
            for each in self._session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        self.has_cache = bool(self._past)
        self._has_types = any(each.name == "token_type_ids" for each in self._session.get_inputs())

    def forward(self, ids: Ids, mask: Ids) -> Floats:
        """Return what the model answers for a batch, as `Reader.forward` says."""
        return self._run(self._session, self._outputs[:1], self._feeds(ids, mask, None))[0]

    def step(self, ids: Ids, state: object | None) -> tuple[Floats, object]:
        """Read more tokens behind what was read, as `Reader.step` says."""
        if not self.has_cache:
            raise ConfigError(describe("step", self.name, "asked of a decoder", self.kind))
        if state is not None and len(ids) > 1 and ids.shape[1] > 1:
            # the fused attention takes more tokens of several rows one by one only
            parts = []
            for place in range(ids.shape[1]):
                logits, state = self.step(ids[:, place : place + 1], state)
                parts.append(logits)
            return np.concatenate(parts, 1), state
        past = cast("Mapping[str, Floats] | None", state)
        seen = 0 if past is None else next(iter(past.values())).shape[2]
        mask = np.ones((len(ids), seen + ids.shape[1]), np.int64)
        found = self._run(self._session, self._outputs, self._feeds(ids, mask, past))
        named = zip(self._outputs[1:], found[1:], strict=True)
        return found[0], {name.replace("present", "past_key_values"): each for name, each in named}

    def layers(self, ids: Ids, mask: Ids) -> Sequence[Floats] | None:
        """Return the states behind each layer, as `Reader.layers` says: the same graph with more
        outputs."""
        if self._layers is None:
            self._layers = self._open(self._with_layers())
        names = [each.name for each in self._layers.get_outputs()]
        return self._run(self._layers, names, self._feeds(ids, mask, None))

    def _run(
        self,
        session: onnxruntime.InferenceSession,
        names: Sequence[str],
        feeds: Mapping[str, object],
    ) -> list[Floats]:
        return cast("list[Floats]", session.run(list(names), dict(feeds)))

    def _with_layers(self) -> bytes:
        import onnx

        model = onnx.load(str(self._path), load_external_data=False)
        made = [name for node in model.graph.node for name in node.output]
        names = [name for name in made if name.startswith(_LAYER)]
        if self.kind == "decoder":
            names[-1] = LAST
        del model.graph.output[:]
        for name in names:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            model.graph.output.append(value)
        return model.SerializeToString()

    def _feeds(self, ids: Ids, mask: Ids, past: Mapping[str, Floats] | None) -> dict[str, object]:
        if mask.shape[1] > self.max_tokens:
            must = f"at most {self.max_tokens} tokens"
            raise ShapeError(describe("text", self.name, must, mask.shape[1], "Cut it"))
        feeds: dict[str, object] = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            feeds["token_type_ids"] = np.zeros_like(ids)
        for name, (_, heads, _, dim) in self._past.items():
            held = np.zeros((len(ids), heads, 0, dim), np.float32) if past is None else past[name]
            feeds[name] = held
        return feeds

    def _open(self, model: str | bytes) -> onnxruntime.InferenceSession:
        options = self._runtime.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        options.add_session_config_entry(_FOLDER, str(self._path.parent))
        if self._is_exact:  # or else it rounds the inputs of products with int8 weights by itself
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            return self._runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own types are not public
            must = "an ONNX model that is whole"
            step = "Export the model again"
            raise FormatError(
                describe("file", str(self._path), must, str(error)[:200], step)
            ) from error
