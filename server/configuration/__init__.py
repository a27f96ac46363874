"""What `posterior serve` can be told: one class is the source of flags, environment, file, help and docs/serve.md."""
