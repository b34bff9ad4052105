"""The jobs: one module per family, thin."""
