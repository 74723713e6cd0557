"""Operations on arrays: one folder each with its api, its reference in jnp, and its kernels. Knows nothing of jmoe."""
