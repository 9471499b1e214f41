"""Our own version, for both sides of a submission to compare; looking it up in the package's metadata takes longer
than to start. A test holds it against pyproject.toml."""

VERSION = "0.1.0"
