"""The verbs, a module each: `EXAMPLE`, `add_arguments(parser)`, `run(args, out) -> exit code`."""
