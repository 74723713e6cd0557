"""Where experts live: the store in host memory, the slots on the device, and which expert is in which slot."""
