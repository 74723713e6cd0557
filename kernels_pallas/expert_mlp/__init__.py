"""SwiGLU experts over groups of rows, their weights read from the slots where they lie."""
