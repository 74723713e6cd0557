"""Copies experts from host memory into slots on the device, by a plan that lies on the device."""
