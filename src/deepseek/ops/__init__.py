"""Mathematics with a meaning and several executions: one package an operation, its reference the
specification."""
