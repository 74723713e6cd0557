"""The network: pure maths. It does not know where experts live."""
