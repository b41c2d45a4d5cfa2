"""Other libraries, each optional: what they need to work with this engine."""
