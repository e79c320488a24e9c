"""The command line: few verbs, each with `--json`, one-line errors and a telling exit code."""
