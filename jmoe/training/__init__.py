"""Training: the demo model, and what tuning a router needs. Every expert is on the device, through `forward_routed`."""
