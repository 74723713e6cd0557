"""What a step is: prefill, decode, sampling. Traced code; the Engine owns the state between steps."""
