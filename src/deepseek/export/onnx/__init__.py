"""ONNX: the graph of a model's flat program, its weights on grids, and ONNX Runtime to read it."""
