"""Brings experts, or the beginnings of them, near the slots before a router has asked for them."""
