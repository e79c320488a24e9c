"""The verbs, one module each: `EXAMPLE`, `add_arguments(parser)` and `run(args, out) -> exit code`."""
