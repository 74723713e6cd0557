"""RMSNorm and a projection, and what is added to it, of few rows."""
