"""Decides, on the device, which experts of a step get which slots, and lists who multiplies with what."""
