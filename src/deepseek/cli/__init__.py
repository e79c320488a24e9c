"""The command line: few verbs, each with `--json`, one-line errors and an exit code that means something."""
